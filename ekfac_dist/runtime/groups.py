"""Process groups: what they are made of, and whether their GPUs can talk at all."""

import functools
from datetime import timedelta

import torch
import torch.distributed as dist

from ekfac_dist.errors import LaunchError

# The workers of other hosts may be started as much later than this one's.
COLLECTIVE_TIMEOUT = timedelta(hours=3)

# Of workers on GPUs: what they tell each other goes through gloo, and does not stand behind a GPU's
# work, which may have failed for good.
GPU_BACKENDS = "cpu:gloo,cuda:nccl"


def backends() -> dict[str, str]:
    """The backends of the default process group, by type of device."""
    return dict(pair.split(":") for pair in dist.get_backend_config().split(","))


def control_group() -> dist.ProcessGroup | None:
    """A group of all workers for objects and tensors on the CPU; None: the default group has one.

    In a user's script the default group may be NCCL's alone. A collective, made once.
    """
    return None if "cpu" in backends() else _new_control_group(id(dist.group.WORLD))


@functools.cache
def _new_control_group(everyone: int) -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)


@functools.cache
def connect_gpus(device: torch.device, group: dist.ProcessGroup | None, everyone: int) -> None:
    """Lets the GPUs of a group meet, so that what keeps them apart is told before any work.

    NCCL connects them in the first collective. A collective, once for each group.

    Args:
        device: This worker's GPU.
        group: The group; None: all workers.
        everyone: Identifies the group of all workers.

    Raises:
        LaunchError: If they cannot be connected.
    """
    try:
        dist.all_reduce(torch.ones((), device=device), group=group)
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[-1].rstrip(".")
        raise LaunchError(
            f"The workers' GPUs could not be connected through NCCL: {cause}. Look at what NCCL "
            "says with NCCL_DEBUG=INFO in the environment."
        ) from error
