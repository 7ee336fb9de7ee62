"""The decomposition of all factors, by worker 0 or shared out over the workers.

Where factors are shared out, each is decomposed by one of the workers that hold it, one in each
copy; or worker 0 decomposes all, and one factor at a time is sent to it and back. Workers work in
rounds of one factor each, see `decomposition_rounds`; all workers that hold a factor get its
eigenvectors, which a thread stores during the next round, so that a run that is killed loses two
rounds at most. A GPU has one factor at a time, see `offloading`.
"""

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ekfac_dist.curvature.blocks import block_sizes
from ekfac_dist.curvature.eigenbasis import (
    CUDA_12_LIMIT,
    can_decompose,
    decompose,
    decomposing_device,
    header_of,
    workspace_bytes,
)
from ekfac_dist.curvature.split_matrices import RowBasis, SplitMatrix, whole
from ekfac_dist.errors import UserError
from ekfac_dist.factors.layout import block_keys, covariance_file, eigenbasis_file
from ekfac_dist.fit import decomposition_rounds
from ekfac_dist.fit.covariance import CovarianceSums
from ekfac_dist.fit.offloading import HOST, free_bytes, sums_and_weights_on_host
from ekfac_dist.fit.storing import StoreFile, Storing
from ekfac_dist.models.modules import TrackedModule, factor_sizes
from ekfac_dist.passes.context import PassContext
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.logs import log_on_main
from ekfac_dist.runtime.memory import as_text
from ekfac_dist.runtime.peers import was_agreed
from ekfac_dist.runtime.progress import Progress


@dataclass(frozen=True)
class Basis:
    """A factor's eigenbasis, as the refit uses it.

    Attributes:
        eigenvectors: [n, n] of each block, in columns, on the worker's device, in the precision of
            the running sums; or split, where rows are rotated faster so.
        eigenvalues: [n] float64 on the CPU, ascending in each block.
    """

    eigenvectors: RowBasis
    eigenvalues: Tensor

    def split(self) -> "Basis":
        """The same with split eigenvectors, which take 1.5 times the memory."""
        return replace(
            self, eigenvectors=[SplitMatrix.of(block) for block in whole(self.eigenvectors)]
        )


def run_eigenbasis(
    name: str,
    covariance: CovarianceSums,
    modules: Sequence[TrackedModule],
    context: PassContext,
    storing: Storing,
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
        storing: Where the factors are written.
        sharded: Whether every worker decomposes its share of the factors; else worker 0 all.
        keep_covariance: Whether raw sums stay in the store; else each is removed when its factor is
            decomposed.
        num_blocks: Number of blocks of each factor.

    Returns:
        The basis of each factor that this worker holds, by name, and the seconds of the stage.

    Raises:
        DecompositionError: If no attempt could decompose a factor; on every worker.
        NonFiniteError: If a sum holds NaN or infinity; on every worker.
        OutputError: If a worker could not write; on every worker.
        Preempted: If SIGTERM has come; what is decomposed is stored.
    """
    start = time.perf_counter()
    run = _Decompositions(covariance, modules, context, storing, keep_covariance, num_blocks)
    with sums_and_weights_on_host(covariance, context.model, context.world):
        bases = run.all(name, sharded=sharded)
    covariance.move_to(context.world.device)
    bases = {
        factor: Basis(covariance.sums.pop(factor), basis.eigenvalues)
        for factor, basis in bases.items()
    }
    covariance.sums.clear()
    return bases, time.perf_counter() - start


class _Decompositions:
    """The decompositions of a group's factors; arguments as of `run_eigenbasis`."""

    def __init__(
        self,
        covariance: CovarianceSums,
        modules: Sequence[TrackedModule],
        context: PassContext,
        storing: Storing,
        keep_covariance: bool,
        num_blocks: int,
    ) -> None:
        self._covariance, self._storing = covariance, storing
        self._keep_covariance = keep_covariance
        self._world, self._holders = context.world, context.summed_over
        self._show_progress = context.show_progress
        self._sizes = {
            factor: block_sizes(size, num_blocks) for factor, size in factor_sizes(modules).items()
        }
        self._shard = 1 if context.owners is None else context.owners.shard
        self._places = dict.fromkeys(self._sizes, 0)  # of each factor's owner
        if context.owners is not None:
            self._places = {factor: context.owners.place_of(factor) for factor in self._sizes}

    def all(self, name: str, *, sharded: bool) -> dict[str, Basis]:
        """The basis of each factor that this worker holds."""
        world, sink = self._world, self._storing.sink
        costs = {factor: sum(n**3 for n in sizes) for factor, sizes in self._sizes.items()}
        stored = [factor for factor in costs if eigenbasis_file(factor) in sink.stored.files]
        bases = self._stored(stored)
        if not self._keep_covariance:
            self._remove_covariances(stored)  # the run may have ended just before that
        left = {factor: cost for factor, cost in costs.items() if factor not in stored}
        rounds = decomposition_rounds.rounds(
            left,
            max((max(self._sizes[factor]) for factor in left), default=0),
            world,
            sharded=sharded,
            places=self._places,
            shard=self._shard,
        )
        progress = Progress(
            name,
            total=sum(left.values()),
            unit="n³",
            enabled=self._show_progress and world.is_main,
            show_rate=False,
        )
        with progress:
            try:
                for decomposed in rounds:
                    bases |= self._one_round(decomposed)
                    progress.update(sum(left[factor] for factor in decomposed.values()))
            except UserError as error:
                # Unless it failed alone: the others do not come to list the last round's files.
                if world.size == 1 or was_agreed(error):
                    self._storing.finish()
                raise
            else:
                self._storing.finish()
            finally:
                self._storing.wait()
        return {factor: bases[factor] for factor in costs if factor in bases}

    def _stored(self, factors: Sequence[str]) -> dict[str, Basis]:
        """Bases that an earlier start of the run stored, of the factors that this worker holds."""
        files = {eigenbasis_file(factor): factor for factor in factors}
        values: dict[str, Tensor] = {}

        def take(file: str, tensors: Mapping[str, Tensor]) -> None:
            factor = files[file]
            vectors, parts = self._keys(factor)
            for key, block in zip(vectors, self._covariance.sums[factor], strict=True):
                block.copy_(tensors[key])
            values[factor] = torch.cat([tensors[key] for key in parts]).to(self._world.device)

        self._storing.read(
            {
                file: [*vectors, *parts]
                for file in files
                for vectors, parts in [self._keys(files[file])]
            },
            {file: self._places[factor] for file, factor in files.items()},
            take,
        )
        held = [factor for factor in factors if factor in self._covariance.sums]
        return {factor: self._sent(factor, values.get(factor), 0) for factor in held}

    def _one_round(self, decomposed: Mapping[int, str]) -> dict[str, Basis]:
        """Decomposes one factor a worker at most, stores the bases, and sends them to all holders.

        Args:
            decomposed: The factor of each worker that takes part, by rank.
        """
        world = self._world
        lent = {r: f for r, f in decomposed.items() if r % self._shard != self._places[f]}
        own = decomposed.get(world.rank)
        blocks, count = self._borrowed(lent)
        if own is not None and own not in lent.values():
            blocks, count = self._covariance.sums[own], self._covariance.counts[own]
        values: Tensor | None = None
        header: dict[str, str] = {}
        lines: list[str] = []
        with world.agree(takes_part=own is not None):
            preemption.end_if_requested()
            if own is not None:
                values, header, lines = _decompose(own, blocks, count, world.device)
        headers, all_lines = zip(*world.gather((header, lines)), strict=True)
        for line in itertools.chain.from_iterable(all_lines):
            log_on_main(world, line)
        bases: dict[str, Basis] = {}
        files = []
        for rank, factor in decomposed.items():
            tensors: Mapping[str, Tensor] = {}
            if rank == world.rank and values is not None:
                tensors = self._tensors(factor, blocks, values)
            copy, own_values = rank // self._shard, values if rank == world.rank else None
            if rank in lent:
                copy, own_values = 0, self._returned(factor, tensors, rank)
            if factor in self._covariance.sums:
                basis = bases[factor] = self._sent(factor, own_values, copy)
                vectors = self._covariance.sums[factor]
                tensors = self._tensors(factor, vectors, basis.eigenvalues)
            writer = self._writer(rank, factor)
            files.append(StoreFile(eigenbasis_file(factor), writer, tensors, headers[rank]))
        self._storing.begin(files, partial(self._after_storing, list(decomposed.values())))
        return bases

    def _after_storing(self, factors: Sequence[str]) -> None:
        if not self._keep_covariance:
            self._remove_covariances(factors)

    def _borrowed(self, lent: Mapping[int, str]) -> tuple[Sequence[Tensor], int]:
        """Sums, and their count, that come from a factor's owner to a worker that holds none."""
        world, covariance = self._world, self._covariance
        blocks: Sequence[Tensor] = []
        count = 0
        for rank, factor in lent.items():
            keys = block_keys("sum", len(self._sizes[factor]))
            tensors: Mapping[str, Tensor] = {}
            if factor in covariance.sums:
                tensors = dict(zip(keys, covariance.sums[factor], strict=True))
                tensors["count"] = torch.tensor(covariance.counts[factor])
            tensors = world.moved(tensors, self._places[factor], rank)
            if rank == world.rank:
                blocks = [tensors[key].to(HOST) for key in keys]
                count = int(tensors["count"])
        return blocks, count

    def _returned(self, factor: str, tensors: Mapping[str, Tensor], rank: int) -> Tensor | None:
        """The eigenvalues that come with the eigenvectors from a worker to a factor's owner."""
        owner = self._places[factor]
        tensors = self._world.moved(tensors, rank, owner)
        if self._world.rank != owner:
            return None
        vectors, parts = self._keys(factor)
        for key, block in zip(vectors, self._covariance.sums[factor], strict=True):
            block.copy_(tensors[key])
        return torch.cat([tensors[key] for key in parts])

    def _sent(self, factor: str, values: Tensor | None, copy: int) -> Basis:
        """A factor's basis on one copy's holder, sent to those of all copies.

        Args:
            factor: The factor; its eigenvectors have taken the place of its sums in that copy.
            values: Its eigenvalues, on that copy's holder.
            copy: The number of that copy.
        """
        blocks = self._covariance.sums[factor]
        if values is None:
            size = sum(self._sizes[factor])
            values = torch.empty(size, dtype=torch.float64, device=self._world.device)
        for tensor in (*blocks, values) if self._holders.size > 1 else ():
            sent = tensor.to(self._world.device)  # where collectives need it
            self._holders.broadcast_(sent, source=copy)
            if sent is not tensor:
                tensor.copy_(sent)
        return Basis(blocks, values.cpu())

    def _writer(self, rank: int, factor: str) -> int:
        """The worker that stores a basis: who decomposed it, if another holder need not."""
        writers = self._storing.sink.writers
        holders = range(self._places[factor], self._world.size, self._shard)
        return next((each for each in (rank, *holders) if each in writers), rank)

    def _keys(self, factor: str) -> tuple[list[str], list[str]]:
        """Names of a factor's eigenvectors and eigenvalues in its file."""
        number = len(self._sizes[factor])
        return block_keys("eigenvectors", number), block_keys("eigenvalues", number)

    def _tensors(self, factor: str, blocks: Sequence[Tensor], values: Tensor) -> dict[str, Tensor]:
        """The tensors of a factor's file."""
        vectors, parts = self._keys(factor)
        tensors = dict(zip(vectors, blocks, strict=True))
        return tensors | dict(zip(parts, values.split(self._sizes[factor]), strict=True))

    def _remove_covariances(self, factors: Iterable[str]) -> None:
        """Removes the stored sums of factors whose bases are stored."""
        with self._world.agree(takes_part=self._world.is_main):
            for factor in factors:
                self._storing.sink.remove(covariance_file(factor))


def _decompose(
    factor: str, blocks: Sequence[Tensor], count: int, device: torch.device
) -> tuple[Tensor, dict[str, str], list[str]]:
    """Decomposes a factor; its sums become its eigenvectors.

    Args:
        factor: The factor's name.
        blocks: Its sums, wherever they are.
        count: Number of summed outer products.
        device: The worker's device.

    Returns:
        Its eigenvalues on the device, the header of its file, and lines about blocks that were
        decomposed on the CPU instead of the device.
    """
    values, checks, lines = [], [], []
    for key, block in zip(block_keys(factor, len(blocks)), blocks, strict=True):
        size, free = len(block), free_bytes(device)
        first = decomposing_device(size, device, free)
        basis = decompose(key, block, count, first)
        if basis.device != device:
            why = "it failed there"
            if not can_decompose(device, size):
                why = f"CUDA {torch.version.cuda} cannot decompose n ≥ {CUDA_12_LIMIT}"
            elif first != device:
                why = f"it needs {as_text(workspace_bytes(size))} there, {as_text(free)} are free"
            lines.append(
                f"decomposition {key} (n = {size}) on the {basis.device} instead of {device}: {why}"
            )
        block.copy_(basis.eigenvectors)
        values.append(basis.eigenvalues.to(device))
        checks.append(basis.checks)
        del basis  # it is float64, and large
    return torch.cat(values), {"count": str(count), **header_of(checks)}, lines
