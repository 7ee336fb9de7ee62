"""Peak memory of this worker, for the closing summary."""

import resource
import sys

import torch


def peak_bytes(device: torch.device) -> dict[str, int]:
    """Peak memory so far: {"host": bytes} and, on a CUDA device, {"device": bytes} beside it."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak


def as_text(num_bytes: float) -> str:
    """A number of bytes for people: 512 B, 3.4 MB, 1.2 GB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
