"""Starts other commands of this package as subprocesses, as a user would start them."""

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = (sys.executable, "-m", "ekfac_dist")
END_SECONDS = 30.0  # wait for a terminated command before it is killed


def launch_line(accelerate_config: Path, command: str, config: Path) -> list[str]:
    """The command line that runs a command on several workers of this machine.

    Args:
        accelerate_config: File with the configuration of Accelerate's launcher.
        command: estimate or query.
        config: File with the configuration of the command.
    """
    launch = [*PROGRAM, "launch", "--config_file", str(accelerate_config)]
    return [*launch, command, "--config", str(config)]


def call(step: str, command: Sequence[str]) -> int:
    """Runs a command to its end; it inherits standard output and standard error.

    If this process is interrupted, the command is terminated too.

    Args:
        step: Name of the command, for the message about its failure.
        command: Program and arguments.

    Returns:
        The exit status; 128 + N if signal N ended the command, as in a shell.
    """
    process = subprocess.Popen(command)
    with stopped_with_this_process(process):
        status = process.wait()
    if status < 0:
        status = 128 - status
    if status != 0:
        print(
            f"The demo stops: `{step}` ended with exit status {status}; what it said is above.",
            file=sys.stderr,
            flush=True,
        )
    return status


@contextmanager
def stopped_with_this_process(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Context in which a subprocess is terminated, too, if this process is interrupted."""
    try:
        yield
    except BaseException:
        process.terminate()  # the launcher passes this on to its workers
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        raise


@contextmanager
def ends_its_children() -> Iterator[None]:
    """Context in which SIGTERM raises an exception, so that `call` ends its command as well."""

    def exit_with_signal(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    previous_handler = signal.signal(signal.SIGTERM, exit_with_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
