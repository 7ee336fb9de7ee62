"""Memory and disk space that are free, and this worker's own use of memory, in bytes.

`psutil` reads what the host has; the limits of control groups, by which schedulers and containers
cut a process's memory, are read here, for `psutil` does not know them.
"""

import math
import shutil
import sys
from pathlib import Path

import psutil
import torch

_CONTROL_GROUPS = Path("/sys/fs/cgroup")


def peak_bytes(device: torch.device) -> dict[str, int]:
    """This process's peak memory so far, in bytes.

    Returns:
        "host", and on a CUDA device "device" beside it.
    """
    import resource  # not on Windows, where stores can be read

    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak


def available_bytes(device: torch.device) -> int:
    """Free memory of a CUDA device, or of the host within this process's control groups.

    What this process's allocator of device memory keeps without using it counts as free.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return min(psutil.virtual_memory().available, _left_of_control_groups())


def total_bytes(device: torch.device) -> float:
    """All memory of a CUDA device; infinite for the host, whose memory is shared."""
    if device.type != "cuda":
        return math.inf
    return float(torch.cuda.get_device_properties(device).total_memory)


def _left_of_control_groups() -> int:
    """The least that any control group around this process leaves; `sys.maxsize` without limits."""
    left = sys.maxsize
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return left
    for line in lines:
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if names == [""]:  # version 2
            root, files = _CONTROL_GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in names:
            root = _CONTROL_GROUPS / "memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                left = min(left, _left_of_group(folder, *files))
    return max(0, left)


def _left_of_group(folder: Path, limit_file: str, usage_file: str, cache_field: str) -> int:
    """A control group's limit, less its memory that cannot be reclaimed at once."""
    try:
        limit = (folder / limit_file).read_text().strip()
        usage = int((folder / usage_file).read_text())
        stat_lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return sys.maxsize
    if limit == "max":
        return sys.maxsize
    reclaimable = dict(line.split() for line in stat_lines).get(cache_field, 0)
    return int(limit) - usage + int(reclaimable)


def own_bytes() -> int:
    """This process's resident memory now."""
    return int(psutil.Process().memory_info().rss)


def free_disk_bytes(path: Path) -> int:
    """Free space on the disk of a path, which need not exist yet."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free


def as_text(num_bytes: float) -> str:
    """A number of bytes for people: 512 B, 3.4 MB, 1.2 GB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
