"""Whether GPUs can be used as the workers were started: told at the start, with what would do."""

import os
import re
from pathlib import Path

import torch

from ekfac_dist.errors import LaunchError, first_line

_DRIVER = Path("/proc/driver/nvidia/version")


def hidden_by_the_user() -> bool:
    """Whether CUDA's own variable hides all GPUs, as launch/accelerate/cpu.yaml has it."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all").partition(",")[0] in ("", "-1")


def require_usable_gpu(asked_by: str) -> None:
    """Refuses to compute on the CPU where GPUs were asked for.

    Args:
        asked_by: What asks for GPUs, for the error.

    Raises:
        LaunchError: If no GPU can be used; it names the driver, and for what torch was built.
    """
    if torch.accelerator.is_available():
        return
    raise LaunchError(
        f"{asked_by} asks for GPUs, and none can be used: {_why_none()}. Mend that, or take the "
        "CPU: launch/accelerate/cpu.yaml, or ACCELERATE_USE_CPU=true."
    )


def _why_none() -> str:
    """Why no GPU can be used, in words: the driver, and for what torch was built."""
    build = f"torch {torch.__version__} is built for the CPU alone"
    if torch.version.cuda is not None:
        build = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
    driver = "there is no NVIDIA driver"
    if _DRIVER.exists():
        version = re.search(r"\d+\.\d+(\.\d+)?", _DRIVER.read_text())
        driver = f"the driver is {version[0] if version else 'of an unknown version'}"
    fault = ""
    if torch.version.cuda is not None:
        try:
            torch.cuda.init()
        except RuntimeError as error:
            fault = f" ({'. '.join(first_line(error).split('. ')[:2])})"
    return f"{build}, and {driver}{fault}"


def identity(device: torch.device) -> tuple[str, int]:
    """What tells a GPU from all others, "" for another device, and how many this worker sees."""
    if device.type != "cuda":
        return "", 0
    return str(torch.cuda.get_device_properties(device).uuid), torch.cuda.device_count()


def require_own_gpus(workers: list[tuple[str, str, int]]) -> None:
    """Refuses workers that share a GPU, which NCCL would refuse in its first collective.

    Args:
        workers: Host, the GPU's identity, and the number of GPUs that it sees, of each worker.

    Raises:
        LaunchError: If two workers have one GPU.
    """
    first: dict[str, int] = {}
    for rank, (host, gpu, seen) in enumerate(workers):
        other = first.setdefault(gpu, rank)
        if gpu and other != rank:
            on_host = [name for name, _, _ in workers].count(host)
            raise LaunchError(
                f"Workers {other} and {rank} share a GPU: {host} has {on_host} workers, of which "
                f"each sees {seen} GPU{'s' * (seen != 1)}. Start as many workers as there are GPUs "
                f"(--num_processes {seen})."
            )
