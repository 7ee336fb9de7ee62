"""Where factors will be decomposed, found out and told before the first pass."""

from collections.abc import Mapping

import torch

from ekfac_dist.curvature.eigenbasis import can_decompose, check_size, decomposing_device
from ekfac_dist.curvature.eigenbasis import cuda_limit as limit_of
from ekfac_dist.fit.rates import DECOMPOSITION_OPERATIONS, measured_decomposition
from ekfac_dist.runtime.logs import log_on_main
from ekfac_dist.runtime.memory import total_bytes
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.progress import clock

_CPU = torch.device("cpu")


def check_decompositions(largest_blocks: Mapping[str, int], world: World) -> None:
    """Refuses factors that are too large for worker 0, and tells which its GPU leaves to its CPU.

    A collective.

    Args:
        largest_blocks: n of each factor's largest block, by the factor's name.
        world: The workers.

    Raises:
        DecompositionError: If a factor is too large for worker 0's device, and for a CPU; on every
            worker.
    """
    own = world.device.type, torch.version.cuda, total_bytes(world.device)
    kind, cuda, device_bytes = world.share(own)
    device = torch.device(kind)
    with world.agree():
        for factor, size in largest_blocks.items():
            check_size(factor, size, device, cuda=cuda, device_bytes=device_bytes)
    if kind == "cpu":
        return
    for size in sorted(set(largest_blocks.values())):
        if decomposing_device(size, device, device_bytes, cuda) != device and world.is_main:
            log_on_main(world, _told(size, device, cuda))


def _told(size: int, device: torch.device, cuda: str | None) -> str:
    number = torch.get_num_threads()
    why = "the GPU has no room"
    if not can_decompose(device, size, cuda):
        why = f"CUDA {cuda} cannot decompose n ≥ {limit_of(cuda)}"
    return (
        f"decomposition of factors with n = {size} on the CPU: {why}. About "
        f"{clock(_seconds_on_cpu(size))} each with {number} thread{'s' * (number > 1)}; less with "
        "factors.blocks, or shared out over the workers (factors.eigen: sharded)"
    )


def _seconds_on_cpu(size: int) -> float:
    """The time of a decomposition on this CPU, from a small one: it grows with n³."""
    return DECOMPOSITION_OPERATIONS * size**3 / (1e9 * measured_decomposition(_CPU))
