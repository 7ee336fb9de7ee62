"""Starts workers with Accelerate's launcher and passes on their exit status.

`accelerate launch` itself exits with status 1 and a traceback of its own, whatever the workers'
status was. Started from here, nothing is printed after a worker's error message, and the exit
status is that worker's.
"""

import argparse
import io
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import TYPE_CHECKING

from ekfac_dist.errors import MENDABLE, ConfigError, LaunchError, Preempted
from ekfac_dist.runtime.importing import importing
from ekfac_dist.runtime.platforms import num_cpus, says_yes

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_COMMANDS = ("estimate", "query", "index", "evaluate", "serve")


def launch_workers(arguments: Sequence[str]) -> int:
    """Runs a command of this package on several workers, under Accelerate's launcher.

    Args:
        arguments: The launcher's own options, then the command and its options.

    Returns:
        0 if all workers succeeded, else the exit status of the first worker that failed: 2 where it
        has printed an error, 143 where SIGTERM ended it, 1 for any other failure; 128 + N if signal
        N ended the launcher.

    Raises:
        ConfigError: If there is no command to run, the launcher refuses its options or its
            configuration, or the workers cannot be launched.
    """
    with importing():
        from accelerate.commands.launch import launch_command
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = _parsed_options(arguments)
    # The launcher's log repeats, as an error of its own, what the worker has printed already.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(options)
    except ChildFailedError as error:
        return _status_of_failed_worker(error)
    except SignalException as error:
        print(f"ekfac-dist: ended by {error.sigval.name}", file=sys.stderr, flush=True)
        return 128 + error.sigval
    except subprocess.CalledProcessError as error:
        return 2 if error.returncode == 2 else 1
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        raise ConfigError(f"The workers could not be launched: {error}.") from error
    return 0


def _parsed_options(arguments: Sequence[str]) -> argparse.Namespace:
    """The launcher's options, which make each worker run `python -m ekfac_dist COMMAND …`."""
    from accelerate.commands.launch import launch_command_parser

    if not any(command in arguments for command in _COMMANDS):
        raise ConfigError(
            "launch is given no command to run; write the launcher's options first, then "
            f"{', '.join(_COMMANDS[:-1])} or {_COMMANDS[-1]} and its options."
        )
    parser_output = io.StringIO()
    try:
        with redirect_stderr(parser_output):
            options = launch_command_parser().parse_args(list(arguments))
    except SystemExit as exit_request:
        if not exit_request.code:
            raise  # the user asked for help
        reason = parser_output.getvalue().strip().rpartition("error: ")[2]
        raise ConfigError(f"The launcher refuses its options: {reason}.") from exit_request
    if options.training_script not in _COMMANDS:
        raise ConfigError(
            f"launch can run {', '.join(_COMMANDS)}, not {options.training_script!r}."
        )
    options.training_script_args = [options.training_script, *options.training_script_args]
    options.training_script = "ekfac_dist"
    options.module = True
    if options.config_file is not None:
        _complete_options(options)
    return options


def _status_of_failed_worker(error: "ChildFailedError") -> int:
    """The exit status that the first worker to fail gives the launcher."""
    # A worker that a signal ended is the cause of the others' ends, whichever was noticed first.
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


def _complete_options(options: argparse.Namespace) -> None:
    """Passes on two settings that the launcher itself leaves out: `use_cpu`, and CPU threads.

    Each worker gets an equal part of its machine's CPUs as threads, unless the user has set a
    number.

    Args:
        options: The launcher's options, with a configuration file; changed in place.

    Raises:
        ConfigError: If the configuration file does not exist or cannot be used.
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
    local_workers = max(1, workers // max(1, machines))
    if uses_cpu or options.cpu or says_yes("ACCELERATE_USE_CPU"):
        os.environ["ACCELERATE_USE_CPU"] = "true"
    else:
        _require_gpus(file, local_workers)
    if options.num_cpu_threads_per_process is None and "OMP_NUM_THREADS" not in os.environ:
        options.num_cpu_threads_per_process = max(1, num_cpus() // local_workers)


def _require_gpus(file: str, local_workers: int) -> None:
    """Refuses a configuration for GPUs where there are none, or fewer than workers.

    Args:
        file: The configuration file.
        local_workers: Number of workers of this machine.

    Raises:
        LaunchError: If no GPU can be used, or workers would have to share one.
    """
    import torch

    from ekfac_dist.runtime.gpus import require_usable_gpu

    require_usable_gpu(file)
    number = torch.cuda.device_count()
    if local_workers > number:
        raise LaunchError(
            f"{file} starts {local_workers} workers on this machine, which has {number} "
            f"GPU{'s' * (number != 1)}, and each needs one of its own: give --num_processes, of "
            "all machines together."
        )
