"""The decomposition of all factors, by worker 0 or shared out over the workers.

Shares are balanced by n³: the largest factor first, each to the worker with least to do. As many
workers of a host take part as its memory allows. They work in rounds of one factor each; after each
round worker 0 stores the new eigenvectors, and all workers get them, so that an interrupted run
loses one round at most.
"""

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac_dist.curvature.eigenbasis import decompose, header_of, workspace_bytes
from ekfac_dist.data.batch_plan import assign_batches
from ekfac_dist.factors.layout import block_keys, covariance_file, eigenbasis_file
from ekfac_dist.factors.sinks import FactorSink
from ekfac_dist.fit.covariance import CovarianceSums
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.memory import available_bytes
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.progress import Progress


@dataclass(frozen=True)
class Basis:
    """A factor's eigenbasis, as the refit uses it.

    Attributes:
        eigenvectors: [n, n] of each block, in columns, on the worker's device, in the precision of
            the running sums.
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
    """Decomposes every factor that is not in the store yet, stores it, and sends it to all workers.

    Eigenvectors take the place of the sums, in their memory.

    Args:
        name: What the stage is called in progress.
        covariance: The reduced sums; empty afterwards.
        world: The workers.
        sink: Where the factors are written, by worker 0.
        sharded: Whether every worker decomposes its share of the factors; else worker 0 all.
        keep_covariance: Whether raw sums stay in the store; else each is removed when its factor is
            decomposed.
        show_progress: Whether worker 0 shows progress.

    Returns:
        The basis of each factor by name, and the seconds of the stage.

    Raises:
        DecompositionError: If no attempt could decompose a factor; on every worker.
        NonFiniteError: If a sum holds NaN or infinity; on every worker.
        OutputError: If worker 0 could not write; on every worker.
        Preempted: If SIGTERM has come; what is decomposed is stored.
    """
    start = time.perf_counter()
    costs = {f: sum(len(b) ** 3 for b in blocks) for f, blocks in covariance.sums.items()}
    stored = [factor for factor in costs if eigenbasis_file(factor) in sink.stored.files]
    bases = {factor: _stored_basis(factor, covariance, world, sink) for factor in stored}
    with world.agree(takes_part=world.is_main):
        for factor in () if keep_covariance else stored:
            sink.remove(covariance_file(factor))  # the run may have ended just before that
    left = {factor: cost for factor, cost in costs.items() if factor not in bases}
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
    return {factor: bases[factor] for factor in costs}, time.perf_counter() - start


def _stored_basis(factor: str, covariance: CovarianceSums, world: World, sink: FactorSink) -> Basis:
    """A basis that an earlier start of the run stored, sent by worker 0 to all."""
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
    """Decomposes one factor a worker at most, stores the bases, and sends them to all.

    Args:
        decomposed: The factor of each worker that takes part, by rank.
        covariance: The reduced sums.
        world: The workers.
        sink: Where the factors are written.
        keep_covariance: Whether raw sums stay in the store.
    """
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
    """A factor's eigenvalues and the header of its file; its sums become its eigenvectors."""
    blocks, count = covariance.sums[factor], covariance.counts[factor]
    values, checks = [], []
    for key, block in zip(block_keys(factor, len(blocks)), blocks, strict=True):
        basis = decompose(key, block, count, world.device)
        block.copy_(basis.eigenvectors)
        values.append(basis.eigenvalues.to(world.device))
        checks.append(basis.checks)
        del basis  # it is float64, and large
    return torch.cat(values), {"count": str(count), **header_of(checks)}


def _values_of(blocks: Sequence[Tensor], world: World) -> Tensor:
    """An uninitialised vector for a factor's eigenvalues."""
    return torch.empty(sum(map(len, blocks)), dtype=torch.float64, device=world.device)


def _sent(blocks: Sequence[Tensor], values: Tensor, owner: int, world: World) -> Basis:
    """One worker's basis, sent to all."""
    for block in blocks:
        world.broadcast_(block, source=owner)
    return Basis(blocks, world.broadcast_(values, source=owner).cpu())


def _rounds(
    costs: Mapping[str, int], largest: int, world: World, *, sharded: bool
) -> list[dict[int, str]]:
    """The rounds of decompositions, each {rank: factor}.

    Factors come in model order; the costliest first if several workers take part.

    Args:
        costs: n³ of each factor, summed over its blocks.
        largest: n of the largest block.
        world: The workers.
        sharded: Whether workers other than 0 may take part.
    """
    if not costs:
        return []
    workers = _ranks_with_memory(largest, world) if sharded else [0]
    names = list(costs)
    if len(workers) > 1:
        names.sort(key=lambda factor: -costs[factor])  # a round is as long as its longest
    shares = assign_batches([costs[name] for name in names], len(workers))
    return [
        {
            worker: names[share[number]]
            for worker, share in zip(workers, shares, strict=True)
            if number < len(share)
        }
        for number in range(max(map(len, shares)))
    ]


def _ranks_with_memory(largest: int, world: World) -> Sequence[int]:
    """Ranks of the workers that have the memory to decompose at the same time."""
    need = workspace_bytes(largest)
    places = world.gather((socket.gethostname(), str(world.device), available_bytes(world.device)))
    ranks: list[int] = []
    taken: dict[tuple[str, str], int] = {}
    for rank, (host, device, free) in enumerate(places):
        place = (host, device)
        taken[place] = taken.get(place, 0) + need
        if taken[place] <= free or rank == 0:  # worker 0 would have to do it alone, too
            ranks.append(rank)
    return ranks
