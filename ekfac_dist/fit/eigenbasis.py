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

from ekfac_dist.curvature.blocks import block_sizes
from ekfac_dist.curvature.eigenbasis import decompose, header_of, workspace_bytes
from ekfac_dist.data.batch_plan import assign_batches
from ekfac_dist.factors.layout import block_keys, covariance_file, eigenbasis_file
from ekfac_dist.factors.sinks import FactorSink
from ekfac_dist.fit.covariance import CovarianceSums
from ekfac_dist.models.modules import TrackedModule, factor_sizes
from ekfac_dist.passes.context import PassContext
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
    modules: Sequence[TrackedModule],
    context: PassContext,
    sink: FactorSink,
    *,
    sharded: bool,
    keep_covariance: bool,
    num_blocks: int,
) -> tuple[dict[str, Basis], float]:
    """Decomposes every factor that is not in the store yet, stores it, and sends it to its holders.

    Eigenvectors take the place of the sums, in their memory.

    Args:
        name: What the stage is called in progress.
        covariance: The reduced sums that this worker holds; empty afterwards.
        modules: The modules of the group, in model order.
        context: The workers, and who holds which factors.
        sink: Where the factors are written, by worker 0.
        sharded: Whether every worker decomposes its share of the factors; else worker 0 all.
        keep_covariance: Whether raw sums stay in the store; else each is removed when its factor is
            decomposed.
        num_blocks: Number of blocks of each factor.

    Returns:
        The basis of each factor that this worker holds, by name, and the seconds of the stage.

    Raises:
        DecompositionError: If no attempt could decompose a factor; on every worker.
        NonFiniteError: If a sum holds NaN or infinity; on every worker.
        OutputError: If worker 0 could not write; on every worker.
        Preempted: If SIGTERM has come; what is decomposed is stored.
    """
    start = time.perf_counter()
    run = _Decompositions(covariance, modules, context, sink, keep_covariance, num_blocks)
    bases = run.all(name, sharded=sharded)
    covariance.sums.clear()
    return bases, time.perf_counter() - start


class _Decompositions:
    """The decompositions of a group's factors; arguments as of `run_eigenbasis`."""

    def __init__(
        self,
        covariance: CovarianceSums,
        modules: Sequence[TrackedModule],
        context: PassContext,
        sink: FactorSink,
        keep_covariance: bool,
        num_blocks: int,
    ) -> None:
        self._covariance, self._sink, self._keep_covariance = covariance, sink, keep_covariance
        self._world, self._holders = context.world, context.summed_over
        self._show_progress = context.show_progress
        self._sizes = {
            factor: block_sizes(size, num_blocks) for factor, size in factor_sizes(modules).items()
        }
        self._shard = 1 if context.owners is None else context.owners.shard
        self._places = dict.fromkeys(self._sizes, 0)  # of each factor's owner
        if context.owners is not None:
            for module in modules:
                place = context.owners.places[module.input]
                self._places |= {module.input: place, module.output: place}

    def all(self, name: str, *, sharded: bool) -> dict[str, Basis]:
        """The basis of each factor that this worker holds."""
        world, sink = self._world, self._sink
        costs = {factor: sum(n**3 for n in sizes) for factor, sizes in self._sizes.items()}
        stored = [factor for factor in costs if eigenbasis_file(factor) in sink.stored.files]
        bases: dict[str, Basis] = {}
        for factor in stored:
            bases |= self._stored(factor)
        with world.agree(takes_part=world.is_main):
            for factor in () if self._keep_covariance else stored:
                sink.remove(covariance_file(factor))  # the run may have ended just before that
        left = {factor: cost for factor, cost in costs.items() if factor not in stored}
        progress = Progress(
            name,
            total=sum(left.values()),
            unit="n³",
            enabled=self._show_progress and world.is_main,
            show_rate=False,
        )
        with progress:
            for decomposed in self._rounds(left, sharded=sharded):
                bases |= self._one_round(decomposed)
                progress.update(sum(left[factor] for factor in decomposed.values()))
        return {factor: bases[factor] for factor in costs if factor in bases}

    def _stored(self, factor: str) -> dict[str, Basis]:
        """A basis that an earlier start of the run stored, sent by worker 0 to its holders."""
        world, file = self._world, eigenbasis_file(factor)
        number = len(self._sizes[factor])
        keys = [*block_keys("eigenvectors", number), *block_keys("eigenvalues", number)]
        tensors: Mapping[str, Tensor] = {}
        with world.agree(takes_part=world.is_main):
            if world.is_main:
                tensors = {key: self._sink.read(file, key) for key in keys}
        tensors = world.moved(tensors, 0, self._places[factor])
        blocks = self._covariance.sums.get(factor)
        if blocks is None:
            return {}
        values = self._empty_values(factor)
        if tensors:
            for key, block in zip(keys, blocks, strict=False):
                block.copy_(tensors[key])
            values.copy_(torch.cat([tensors[key] for key in keys[number:]]))
        return {factor: self._sent(blocks, values, 0)}

    def _one_round(self, decomposed: Mapping[int, str]) -> dict[str, Basis]:
        """Decomposes one factor a worker at most, stores the bases, and sends them to all holders.

        Args:
            decomposed: The factor of each worker that takes part, by rank.
        """
        world, covariance = self._world, self._covariance
        header: dict[str, str] = {}
        own = decomposed.get(world.rank)
        own_values = torch.empty(0)
        with world.agree(takes_part=own is not None):
            preemption.end_if_requested()
            if own is not None:
                own_values, header = _decompose(own, covariance, world)
        headers, bases = world.gather(header), {}
        for rank, factor in decomposed.items():
            tensors: Mapping[str, Tensor] = {}
            blocks = covariance.sums.get(factor)
            if blocks is not None:
                values = own_values if rank == world.rank else self._empty_values(factor)
                basis = bases[factor] = self._sent(blocks, values, rank // self._shard)
                sizes, number = self._sizes[factor], len(blocks)
                tensors = dict(zip(block_keys("eigenvectors", number), blocks, strict=True))
                parts = basis.eigenvalues.split(sizes)
                tensors |= zip(block_keys("eigenvalues", number), parts, strict=True)
            tensors = world.moved(tensors, self._places[factor], 0)
            with world.agree(takes_part=world.is_main):
                self._sink.write(eigenbasis_file(factor), tensors, headers[rank])
                if not self._keep_covariance:
                    self._sink.remove(covariance_file(factor))
        return bases

    def _empty_values(self, factor: str) -> Tensor:
        """An uninitialised vector for a factor's eigenvalues."""
        size = sum(self._sizes[factor])
        return torch.empty(size, dtype=torch.float64, device=self._world.device)

    def _sent(self, blocks: Sequence[Tensor], values: Tensor, copy: int) -> Basis:
        """One holder's basis, sent to all."""
        for block in blocks:
            self._holders.broadcast_(block, source=copy)
        return Basis(blocks, self._holders.broadcast_(values, source=copy).cpu())

    def _rounds(self, costs: Mapping[str, int], *, sharded: bool) -> list[dict[int, str]]:
        """The rounds of decompositions, each {rank: factor}.

        Factors come in model order; the costliest first if several workers take part.

        Args:
            costs: n³ of each factor, summed over its blocks.
            sharded: Whether workers other than 0 may take part.
        """
        if not costs:
            return []
        ranks: Sequence[int] = [0]
        if sharded or self._shard > 1:
            largest = max(max(self._sizes[factor]) for factor in costs)
            ranks = _ranks_with_memory(largest, self._world)
        names = list(costs)
        if len(ranks) > 1 or self._shard > 1:
            names.sort(key=lambda factor: -costs[factor])  # a round is as long as its longest
        shares: dict[int, list[str]] = {}
        for place in range(self._shard):
            holders = [rank for rank in ranks if rank % self._shard == place] or [place]
            own = [name for name in names if self._places[name] == place]
            for rank, share in zip(
                holders, assign_batches([costs[name] for name in own], len(holders)), strict=True
            ):
                shares[rank] = [own[number] for number in share]
        return [
            {rank: share[number] for rank, share in shares.items() if number < len(share)}
            for number in range(max(map(len, shares.values())))
        ]


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
