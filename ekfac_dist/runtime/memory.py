"""Memory: what is free, and this worker's peak, for the closing summary."""

import resource
import shutil
import sys
from pathlib import Path

import torch

_CONTROL_GROUPS = Path("/sys/fs/cgroup")


def peak_bytes(device: torch.device) -> dict[str, int]:
    """Peak memory so far: {"host": bytes} and, on a CUDA device, {"device": bytes} beside it."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak


def available_bytes(device: torch.device) -> int:
    """Memory that is free: a CUDA device's own, or the host's, as its kernel says.

    Where a kernel does not say (other than Linux's) there is no limit.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        told = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return sys.maxsize
    lines = dict(line.split(":", 1) for line in told.splitlines() if ":" in line)
    return min(int(lines["MemAvailable"].split()[0]) * 1024, _left_of_control_group())


def _left_of_control_group() -> int:
    """What a scheduler's or a container's limits leave to this process."""
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
                left = min(left, _left_of(folder, *files))
    return max(0, left)


def _left_of(folder: Path, limit_file: str, usage_file: str, cache: str) -> int:
    """The limit of one group, less what is used and cannot be given up at once."""
    try:
        limit = (folder / limit_file).read_text().strip()
        usage = int((folder / usage_file).read_text())
        told = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return sys.maxsize
    stat = dict(line.split() for line in told)
    if limit == "max":
        return sys.maxsize
    return int(limit) - usage + int(stat.get(cache, 0))


def own_bytes() -> int:
    """What this process holds of the host's memory now; 0 where a kernel does not say."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0
    return int(pages) * resource.getpagesize()


def free_disk_bytes(path: Path) -> int:
    """What can still be written where a path is, or would be."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


def as_text(num_bytes: float) -> str:
    """A number of bytes for people: 512 B, 3.4 MB, 1.2 GB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
