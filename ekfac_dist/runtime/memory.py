"""Memory: what is free, and this worker's peak, for the closing summary."""

import resource
import sys
from pathlib import Path

import torch


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
    return int(lines["MemAvailable"].split()[0]) * 1024


def as_text(num_bytes: float) -> str:
    """A number of bytes for people: 512 B, 3.4 MB, 1.2 GB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
