"""Starting workers with Accelerate's launcher, and ending as they end.

`accelerate launch` itself ends with status 1 and its own traceback whatever the workers' status
was. Called from here, a sentence that a worker has said is the last word, and its status the
status of the whole.
"""

import argparse
import io
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr

from ekfac_dist.errors import MENDABLE, ConfigError, Preempted

_COMMANDS = ("estimate", "query")


def launch_workers(arguments: Sequence[str]) -> int:
    """Runs a command of this package under Accelerate's launcher.

    Args:
        arguments: The launcher's own options, then the command and its options.

    Returns:
        0, or the exit status of the first worker that failed: 2 where it has said why, 143 where
        SIGTERM ended it, 1 for any other; 128 + N if signal N ended the launcher.

    Raises:
        ConfigError: There is no command to run, or the launcher refuses its options.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not any(command in arguments for command in _COMMANDS):
        raise ConfigError(
            "launch is given no command to run; write the launcher's options first, then "
            f"{' or '.join(_COMMANDS)} and its options."
        )
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            options = launch_command_parser().parse_args(list(arguments))
    except SystemExit as left:
        if not left.code:
            raise  # help, which was asked for
        reason = complaint.getvalue().strip().rpartition("error: ")[2]
        raise ConfigError(f"The launcher refuses its options: {reason}.") from left
    if options.training_script not in _COMMANDS:
        raise ConfigError(
            f"launch can run {', '.join(_COMMANDS)}, not {options.training_script!r}."
        )
    options.training_script_args = [options.training_script, *options.training_script_args]
    options.training_script = "ekfac_dist"
    options.module = True
    if options.config_file is not None:
        _complete(options)
    # The launcher's log repeats, as an error of its own, what the worker has said already.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(options)
    except ChildFailedError as error:
        # One that a signal ended is the cause of the others' ends, whichever was seen first.
        rank, failure = min(
            error.failures.items(), key=lambda item: (item[1].exitcode >= 0, item[1].timestamp)
        )
        if failure.exitcode in (MENDABLE, Preempted.status):
            return failure.exitcode
        cause = f"ended with status {failure.exitcode}"
        if failure.exitcode < 0:
            cause = f"was ended by {failure.signal_name()}"
        print(f"ekfac-dist: error: worker {rank} {cause}", file=sys.stderr, flush=True)
        return 1
    except SignalException as error:
        print(f"ekfac-dist: ended by {error.sigval.name}", file=sys.stderr, flush=True)
        return 128 + error.sigval
    except subprocess.CalledProcessError as error:
        return 2 if error.returncode == 2 else 1
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        raise ConfigError(f"The workers could not be launched: {error}.") from error
    return 0


def _complete(options: argparse.Namespace) -> None:
    """Hands on two things that the launcher itself leaves out: use_cpu, and enough threads.

    Args:
        options: The launcher's options, which name its configuration.
    """
    from accelerate.commands.config.config_args import load_config_from_file

    file = options.config_file
    try:
        config = load_config_from_file(file)
        workers = int(options.num_processes or config.num_processes)
        machines = int(options.num_machines or config.num_machines)
        uses_cpu = bool(config.use_cpu)
    except FileNotFoundError as error:
        raise ConfigError(f"There is no launcher configuration {file}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"The launcher configuration {file} cannot be used: {error}.") from error
    if uses_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if options.num_cpu_threads_per_process is None and "OMP_NUM_THREADS" not in os.environ:
        workers_here = max(1, workers // max(1, machines))
        options.num_cpu_threads_per_process = max(1, len(os.sched_getaffinity(0)) // workers_here)
