"""Memory of a GPU that is freed while factors are decomposed on it.

    before     weights, running sums of all factors             on the device
    meanwhile  one factor with its workspace                    on the device
               weights; sums and eigenvectors of all others     in the host's memory
    after      weights, eigenvectors of all factors             on the device

On a CPU nothing moves.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ekfac_dist.fit.covariance import CovarianceSums
from ekfac_dist.models.sharding import local, reshard
from ekfac_dist.runtime.logs import log_on_main
from ekfac_dist.runtime.memory import as_text, available_bytes
from ekfac_dist.runtime.processes import World

HOST = torch.device("cpu")


def has_own_memory(device: torch.device) -> bool:
    """Whether a device has memory beside the host's."""
    return device.type not in ("cpu", "meta")


@contextmanager
def sums_and_weights_on_host(
    covariance: CovarianceSums, model: nn.Module, world: World
) -> Iterator[None]:
    """Context in which a worker's sums and weights are in its host's memory; a collective.

    The weights come back at its end, the sums stay there. Where the host of any worker has no room
    for them, those of all workers stay on their devices, which is logged.

    Args:
        covariance: The worker's sums.
        model: The model: the worker's own whole copy, or sharded by FSDP2.
        world: The workers.
    """
    if not any(world.gather(has_own_memory(world.device))):
        yield
        return
    reshard(model)
    storages = _storages(model)
    held = [block.nbytes for blocks in covariance.sums.values() for block in blocks]
    needed = sum(held) + sum(storage.nbytes() for storage in storages)
    hosts = world.gather((socket.gethostname(), needed))
    needed_on_host = sum(each for host, each in hosts if host == socket.gethostname())
    free = available_bytes(HOST)
    lacks = world.gather((needed_on_host > free, needed_on_host, free))
    short = next(((needs, has) for lack, needs, has in lacks if lack), None)
    if short is not None:
        log_on_main(
            world,
            f"decomposition sums and weights stay on the devices: they take {as_text(short[0])} of "
            f"a host's memory, of which {as_text(short[1])} are free",
        )
        yield
        return
    covariance.move_to(HOST)
    with _emptied(storages):
        yield


def free_bytes(device: torch.device) -> int:
    """Free memory of a worker's device, with what its allocator keeps given back first."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return available_bytes(device)


def _storages(model: nn.Module) -> list[torch.UntypedStorage]:
    """The storages of a model's weights, each once, that are in a device's own memory."""
    tensors = [local(tensor).detach() for tensor in (*model.parameters(), *model.buffers())]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return list(
        {
            storage._cdata: storage
            for storage in storages
            if has_own_memory(storage.device) and storage.resizable()
        }.values()
    )


@contextmanager
def _emptied(storages: list[torch.UntypedStorage]) -> Iterator[None]:
    """Context in which storages hold nothing; their content comes back at its end.

    The tensors stay the same objects, and whatever shares memory goes on doing so.
    """
    copies: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []
    try:
        for storage in storages:
            copies.append((storage, torch.UntypedStorage(storage.nbytes()).copy_(storage)))
            storage.resize_(0)
        yield
    finally:
        for storage, copy in copies:
            storage.resize_(copy.nbytes())
            storage.copy_(copy)
