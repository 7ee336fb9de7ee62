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

from ekfac_dist.curvature.eigenbasis import decompose, header_of, workspace_bytes
from ekfac_dist.data.batches import assign_batches
from ekfac_dist.factors.layout import block_keys, covariance_file, eigenbasis_file
from ekfac_dist.factors.sinks import FactorSink
from ekfac_dist.fit.covariance import CovarianceSums
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.memory import available_bytes
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.progress import Progress


@dataclass(frozen=True)
class Basis:
    """A factor's eigenbasis as a worker uses it.

    Attributes:
        eigenvectors: [n, n] of each block, on the worker's device, in the run's precision, in
            columns.
        eigenvalues: [n] float64 on the CPU, ascending in each block.
    """

    eigenvectors: Sequence[Tensor]
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
    work = {f: sum(len(b) ** 3 for b in blocks) for f, blocks in covariance.sums.items()}
    done = [factor for factor in work if eigenbasis_file(factor) in sink.stored.files]
    bases = {factor: _stored(factor, covariance, world, sink) for factor in done}
    with world.agree(takes_part=world.is_main):
        for factor in () if keep_covariance else done:
            sink.remove(covariance_file(factor))  # the run may have ended just before
    left = {factor: n3 for factor, n3 in work.items() if factor not in bases}
    progress = Progress(
        name,
        total=sum(left.values()),
        unit="n³",
        enabled=show_progress and world.is_main,
        show_rate=False,
    )
    with progress:
        largest = max((len(b) for factor in left for b in covariance.sums[factor]), default=0)
        for decomposed in _rounds(left, largest, world, sharded=sharded):
            bases |= _one_round(decomposed, covariance, world, sink, keep_covariance)
            progress.update(sum(left[factor] for factor in decomposed.values()))
    covariance.sums.clear()
    return {factor: bases[factor] for factor in work}, time.perf_counter() - start


def _stored(factor: str, covariance: CovarianceSums, world: World, sink: FactorSink) -> Basis:
    """A basis that an earlier start of the run has stored, from worker 0 on every worker."""
    blocks, file = covariance.sums[factor], eigenbasis_file(factor)
    values = _values_of(blocks, world)
    with world.agree(takes_part=world.is_main):
        if world.is_main:
            for key, block in zip(block_keys("eigenvectors", len(blocks)), blocks, strict=True):
                block.copy_(sink.read(file, key))
            keys = block_keys("eigenvalues", len(blocks))
            values.copy_(torch.cat([sink.read(file, key) for key in keys]))
    return _sent(blocks, values, 0, world)


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
    own_values = torch.empty(0)
    with world.agree(takes_part=own is not None):
        preemption.end_if_requested()
        if own is not None:
            own_values, header = _decompose(own, covariance, world)
    headers, bases = world.gather(header), {}
    for owner, factor in decomposed.items():
        blocks = covariance.sums[factor]
        values = own_values if owner == world.rank else _values_of(blocks, world)
        basis = bases[factor] = _sent(blocks, values, owner, world)
        sizes, number = [len(block) for block in blocks], len(blocks)
        with world.agree(takes_part=world.is_main):
            tensors = dict(zip(block_keys("eigenvectors", number), blocks, strict=True))
            parts = basis.eigenvalues.split(sizes)
            tensors |= zip(block_keys("eigenvalues", number), parts, strict=True)
            sink.write(eigenbasis_file(factor), tensors, headers[owner])
            if not keep_covariance:
                sink.remove(covariance_file(factor))
    return bases


def _decompose(
    factor: str, covariance: CovarianceSums, world: World
) -> tuple[Tensor, dict[str, str]]:
    """A factor's eigenvalues, and how good its decomposition is; its sums become eigenvectors."""
    blocks, count = covariance.sums[factor], covariance.counts[factor]
    values, checks = [], []
    for key, block in zip(block_keys(factor, len(blocks)), blocks, strict=True):
        basis = decompose(key, block, count, world.device)
        block.copy_(basis.eigenvectors)
        values.append(basis.eigenvalues.to(world.device))
        checks.append(basis.checks)
        del basis  # in float64, it need not live through what follows
    return torch.cat(values), {"count": str(count), **header_of(checks)}


def _values_of(blocks: Sequence[Tensor], world: World) -> Tensor:
    """An uninitialised vector for a factor's eigenvalues."""
    return torch.empty(sum(map(len, blocks)), dtype=torch.float64, device=world.device)


def _sent(blocks: Sequence[Tensor], values: Tensor, owner: int, world: World) -> Basis:
    """What one worker has, on every worker."""
    for block in blocks:
        world.broadcast_(block, source=owner)
    return Basis(blocks, world.broadcast_(values, source=owner).cpu())


def _rounds(
    work: Mapping[str, int], largest: int, world: World, *, sharded: bool
) -> list[dict[int, str]]:
    """Which factor each worker decomposes in each round: {worker: factor}.

    In their own order, or the costliest first if several workers take part.

    Args:
        work: n³ of each factor, all its blocks together.
        largest: n of the largest block.
        world: The workers.
        sharded: Whether more than worker 0 take part.
    """
    if not work:
        return []
    workers = _takes_part(largest, world) if sharded else [0]
    names = list(work)
    if len(workers) > 1:
        names.sort(key=lambda factor: -work[factor])  # a round is as long as its longest
    shares = assign_batches([work[name] for name in names], len(workers))
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
