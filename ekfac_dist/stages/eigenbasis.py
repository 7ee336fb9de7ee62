"""Factors are decomposed by worker 0, or by every worker its share; all get the eigenvectors.

Shares are cut by n³, the largest factor first, to the worker with least to do. Several workers of
one host decompose at once only as far as its memory goes. They go in rounds of one factor each, and
worker 0 stores what a round came to before the next begins: what is decomposed stays so, whatever
becomes of the run.
"""

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac_dist.curvature.eigenbasis import decompose, workspace_bytes
from ekfac_dist.data.batches import assign_batches
from ekfac_dist.runtime import preemption
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
    """Decomposes the factors that are not yet, stores them, and sends all to every worker.

    The sums are given up as they are used.

    Args:
        name: What the stage is called in progress.
        covariance: The reduced sums; emptied.
        world: The workers.
        sink: Where the factors go; worker 0 writes.
        sharded: Whether every worker decomposes its share; else worker 0 decomposes all.
        keep_covariance: Whether the stored raw sums stay; else each goes with its decomposition.
        show_progress: Whether worker 0 shows progress.

    Returns:
        The basis of each factor, and the seconds that all of it took.

    Raises:
        DecompositionError, NonFiniteError: On every worker, naming the factor.
        OutputError: On every worker, where worker 0 could not write.
        Preempted: SIGTERM has come, and what is decomposed is stored.
    """
    start = time.perf_counter()
    sizes = {factor: total.shape[0] for factor, total in covariance.sums.items()}
    done = [factor for factor in sizes if eigenbasis_file(factor) in sink.found.files]
    bases = {factor: _stored(factor, covariance, world, sink) for factor in done}
    with world.agree(takes_part=world.is_main):
        for factor in () if keep_covariance else done:
            sink.remove(covariance_file(factor))  # the run may have ended just before
    left = {factor: size for factor, size in sizes.items() if factor not in bases}
    progress = Progress(
        name,
        total=sum(size**3 for size in left.values()),
        unit="n³",
        enabled=show_progress and world.is_main,
        show_rate=False,
    )
    with progress:
        for decomposed in _rounds(left, world, sharded=sharded):
            bases |= _one_round(decomposed, covariance, world, sink, keep_covariance)
            progress.update(sum(left[factor] ** 3 for factor in decomposed.values()))
    covariance.sums.clear()
    return {factor: bases[factor] for factor in sizes}, time.perf_counter() - start


def _stored(factor: str, covariance: CovarianceSums, world: World, sink: FactorSink) -> Basis:
    """A basis that an earlier start of the run has stored, from worker 0 on every worker."""
    vectors, file = covariance.sums[factor], eigenbasis_file(factor)
    values = torch.empty(vectors.shape[0], dtype=torch.float64, device=world.device)
    with world.agree(takes_part=world.is_main):
        if world.is_main:
            vectors.copy_(sink.read(file, "eigenvectors"))
            values.copy_(sink.read(file, "eigenvalues"))
    return Basis(world.broadcast_(vectors), world.broadcast_(values).cpu())


def _one_round(
    decomposed: Mapping[int, str],
    covariance: CovarianceSums,
    world: World,
    sink: FactorSink,
    keep_covariance: bool,
) -> dict[str, Basis]:
    """The decompositions of some factors, one of a worker at most, stored and on every worker."""
    header: dict[str, str] = {}
    own = decomposed.get(world.rank)
    values = torch.empty(0)
    with world.agree(takes_part=own is not None):
        preemption.end_if_requested()
        if own is not None:
            vectors, count = covariance.sums[own], covariance.counts[own]
            basis = decompose(own, vectors, count, world.device)
            vectors.copy_(basis.eigenvectors)  # the sum's memory takes the eigenvectors
            values = basis.eigenvalues.to(world.device)
            header = {"count": str(count), **basis.header()}
            del basis  # in float64, it need not live through what follows
    headers, bases = world.gather(header), {}
    for owner, factor in decomposed.items():
        vectors = world.broadcast_(covariance.sums[factor], source=owner)
        if owner != world.rank:
            values = torch.empty(vectors.shape[0], dtype=torch.float64, device=world.device)
        on_cpu = world.broadcast_(values, source=owner).cpu()
        bases[factor] = Basis(vectors, on_cpu)
        with world.agree(takes_part=world.is_main):
            tensors = {"eigenvectors": vectors, "eigenvalues": on_cpu}
            sink.write(eigenbasis_file(factor), tensors, headers[owner])
            if not keep_covariance:
                sink.remove(covariance_file(factor))
    return bases


def _rounds(sizes: Mapping[str, int], world: World, *, sharded: bool) -> list[dict[int, str]]:
    """Which factor each worker decomposes in each round: {worker: factor}, the largest first."""
    if not sizes:
        return []
    workers = _takes_part(max(sizes.values()), world) if sharded else [0]
    names = sorted(sizes, key=lambda factor: -sizes[factor])
    shares = assign_batches([sizes[name] ** 3 for name in names], len(workers))
    return [
        {
            worker: names[share[number]]
            for worker, share in zip(workers, shares, strict=True)
            if number < len(share)
        }
        for number in range(max(map(len, shares)))
    ]


def _takes_part(largest: int, world: World) -> Sequence[int]:
    """Workers that have the memory to decompose beside each other."""
    need = workspace_bytes(largest)
    places = world.gather((socket.gethostname(), str(world.device), available_bytes(world.device)))
    takes_part: list[int] = []
    taken: dict[tuple[str, str], int] = {}
    for rank, (host, device, free) in enumerate(places):
        place = (host, device)
        taken[place] = taken.get(place, 0) + need
        if taken[place] <= free or rank == 0:  # worker 0 would have to do it alone, too
            takes_part.append(rank)
    return takes_part
