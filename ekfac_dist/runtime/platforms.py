"""What this package does on which operating system; it is tested on Linux alone.

macOS has all that it needs, but a GPU that knows no float64: everything runs there on the CPU.
Windows lacks what files and workers are made with: the flushing of directories, `resource`,
`SIGPIPE`, and a launcher's signals. What only reads runs there. Imports nothing heavy.
"""

import os
import platform
from contextlib import suppress
from pathlib import Path

from ekfac_dist.errors import LaunchError

# Commands that need nothing of what Windows lacks.
_READING = ("inspect",)
_CPU_INFO = Path("/proc/cpuinfo")


def require_system(command: str) -> None:
    """Refuses, at once, a command that cannot run on this operating system.

    Args:
        command: The command's name.

    Raises:
        LaunchError: If this is Windows, and the command does more than read.
    """
    if os.name == "nt" and command not in _READING:
        raise LaunchError(
            f"`ekfac-dist {command}` does not run on Windows, whose Python lacks what it writes "
            "files and starts workers with; use Linux, such as WSL 2 has it. `ekfac-dist "
            f"{_READING[0]}` runs here."
        )


def num_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS: all there are


def processor_name() -> str:
    """The processor's name for people, such as "AMD EPYC 9B45"; its architecture if not known."""
    with suppress(OSError):  # there is no such file but on Linux
        for line in _CPU_INFO.read_text(encoding="utf-8", errors="replace").split("\n"):
            field, _, name = line.partition(":")
            if field.strip() == "model name" and name.strip():
                return name.strip()
    return platform.processor() or platform.machine()


def says_yes(variable: str) -> bool:
    """Whether a variable of the environment says yes, as Accelerate's do."""
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")
