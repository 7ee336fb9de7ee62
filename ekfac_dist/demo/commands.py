"""Other commands of this package, started by the demo as a person would start them."""

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PROGRAM = (sys.executable, "-m", "ekfac_dist")
END_SECONDS = 30.0


def launched(accelerate_config: Path, command: str, config: Path) -> list[str]:
    """The line that runs a command on several workers of this machine.

    Args:
        accelerate_config: Configuration of Accelerate's launcher.
        command: estimate or query.
        config: Configuration of the command.
    """
    launch = [*PROGRAM, "launch", "--config_file", str(accelerate_config)]
    return [*launch, command, "--config", str(config)]


def call(step: str, command: Sequence[str]) -> int:
    """Runs a command to its end, its output going where ours goes.

    Args:
        step: How a sentence about its failure calls it.
        command: Program and arguments.

    Returns:
        Its exit status; as a shell has it, if a signal ended it.
    """
    process = subprocess.Popen(command)
    try:
        status = process.wait()
    except BaseException:
        process.terminate()  # which the launcher passes on to its workers
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
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
def ends_its_children() -> Iterator[None]:
    """Makes a polite end of this process (SIGTERM) an exception, so that children end with it."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
