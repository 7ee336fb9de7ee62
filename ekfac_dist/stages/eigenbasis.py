"""Factors are decomposed by worker 0, or by every worker its share; all get the eigenvectors.

Shares are cut by n³, the largest factor first, to the worker with least to do. Several workers of
one host decompose at once only as far as its memory goes.
"""

import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac_dist.curvature.eigenbasis import decompose, workspace_bytes
from ekfac_dist.data.batches import assign_batches
from ekfac_dist.runtime.memory import available_bytes
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.progress import Progress
from ekfac_dist.runtime.store import FactorSink, covariance_file, eigenbasis_file
from ekfac_dist.stages.covariance import CovarianceSums


@dataclass(frozen=True)
class Basis:
    """A factor's eigenbasis as a worker uses it.

    Attributes:
        eigenvectors: [n, n] on the worker's device, in the run's precision, in columns.
        eigenvalues: [n] float64 on the CPU, ascending.
    """

    eigenvectors: Tensor
    eigenvalues: Tensor


def run_eigenbasis(
    name: str,
    covariance: CovarianceSums,
    world: World,
    sink: FactorSink,
    *,
    sharded: bool,
    keep_covariance: bool,
    show_progress: bool,
) -> tuple[dict[str, Basis], float]:
    """Decomposes the factors, stores them, and sends them to every worker.

    The sums are given up as they are used.

    Args:
        name: What the stage is called in progress.
        covariance: The reduced sums; emptied.
        world: The workers.
        sink: Where the factors go; worker 0 writes.
        sharded: Whether every worker decomposes its share; else worker 0 decomposes all.
        keep_covariance: Whether the raw sums are stored as well.
        show_progress: Whether worker 0 shows progress.

    Returns:
        The basis of each factor, and the seconds that all of it took.

    Raises:
        DecompositionError, NonFiniteError: On every worker, naming the factor.
        OutputError: On every worker, where worker 0 could not write.
    """
    start = time.perf_counter()
    if keep_covariance:
        with world.agree(takes_part=world.is_main):
            for factor, total in covariance.sums.items():
                header = {"count": str(covariance.counts[factor])}
                sink.write(covariance_file(factor), {"sum": total}, header)
    sizes = {factor: total.shape[0] for factor, total in covariance.sums.items()}
    owners = _owners(sizes, world) if sharded else dict.fromkeys(sizes, 0)
    mine = [factor for factor in sizes if owners[factor] == world.rank]
    values: dict[str, Tensor] = {}
    headers: dict[str, dict[str, str]] = {}
    progress = Progress(
        name,
        total=sum(sizes[factor] ** 3 for factor in mine),
        unit="n³",
        enabled=show_progress and world.is_main,
        show_rate=False,
    )
    with world.agree(takes_part=bool(mine)), progress:
        for factor in mine:
            vectors, count = covariance.sums[factor], covariance.counts[factor]
            basis = decompose(factor, vectors, count, world.device)
            vectors.copy_(basis.eigenvectors)  # the sum's memory takes the eigenvectors
            values[factor] = basis.eigenvalues.to(world.device)
            headers[factor] = {"count": str(count), **basis.header()}
            del basis  # in float64, it need not live through the next decomposition
            progress.update(sizes[factor] ** 3)
            world.check_peers()
    return _shared(covariance, owners, values, headers, world, sink), time.perf_counter() - start


def _shared(
    covariance: CovarianceSums,
    owners: Mapping[str, int],
    values: Mapping[str, Tensor],
    headers: Mapping[str, dict[str, str]],
    world: World,
    sink: FactorSink,
) -> dict[str, Basis]:
    """Every worker's bases on every worker, and in the store."""
    bases: dict[str, Basis] = {}
    all_headers = {
        factor: header for some in world.gather(headers) for factor, header in some.items()
    }
    for factor, owner in owners.items():
        vectors = world.broadcast_(covariance.sums.pop(factor), source=owner)
        own = values.get(factor)
        if own is None:
            own = torch.empty(vectors.shape[0], dtype=torch.float64, device=world.device)
        bases[factor] = Basis(vectors, world.broadcast_(own, source=owner).cpu())
        with world.agree(takes_part=world.is_main):
            tensors = {"eigenvectors": vectors, "eigenvalues": bases[factor].eigenvalues}
            sink.write(eigenbasis_file(factor), tensors, all_headers[factor])
    return bases


def _owners(sizes: Mapping[str, int], world: World) -> dict[str, int]:
    """Which worker decomposes each factor."""
    need = workspace_bytes(max(sizes.values()))
    places = world.gather((socket.gethostname(), str(world.device), available_bytes(world.device)))
    takes_part: list[int] = []
    taken: dict[tuple[str, str], int] = {}
    for rank, (host, device, free) in enumerate(places):
        place = (host, device)
        taken[place] = taken.get(place, 0) + need
        if taken[place] <= free or rank == 0:  # worker 0 would have to do it alone, too
            takes_part.append(rank)
    shares = assign_batches([size**3 for size in sizes.values()], len(takes_part))
    names = list(sizes)
    return {names[k]: takes_part[n] for n, share in enumerate(shares) for k in share}
