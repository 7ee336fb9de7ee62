"""Preconditioned query gradients: P_q = (F + λ)⁻¹ ∇ of each row of queries, in every module.

The rows of a block are shared out over the workers; each computes its own, and a sum over workers
gives all of them to everyone. A module's factors are on the device only while they are used. A
gradient is finished, and compressed, as soon as the last query of its row has been seen.

Gradients are of the losses, −log p, on both sides of the inner product, so signs cancel: a positive
score means that more of the training sequence makes the query more likely.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.curvature import products
from ekfac_dist.curvature.blocks import on, rotate_columns_back, rotate_rows
from ekfac_dist.curvature.kronecker import rotate_back
from ekfac_dist.data.batch_plan import assign_batches, may_share
from ekfac_dist.data.batches import Batch, CapturedPositions
from ekfac_dist.factors.factors import ModuleFactors
from ekfac_dist.influence.context import DATA_LABELS, OVERFLOW_ADVICE, STORED, ScoringContext
from ekfac_dist.influence.preconditioned import (
    LowRankGradients,
    PreparedQueries,
    WholeGradients,
    empty_gradients,
)
from ekfac_dist.influence.queries import QuerySet
from ekfac_dist.models.capture.observers import PairObserver
from ekfac_dist.models.capture.rotary import equal_lengths_above
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.passes.context import PassContext
from ekfac_dist.passes.one_pass import run_pass
from ekfac_dist.passes.state import PassState
from ekfac_dist.runtime.processes import World


def prepare(
    name: str, context: ScoringContext, queries: QuerySet, rows: Sequence[int], rank: int | None
) -> PreparedQueries:
    """Computes the preconditioned gradients of some rows, on every worker.

    Args:
        name: What the pass is called in progress and errors.
        context: Model, factors, damping, workers.
        queries: All queries.
        rows: Numbers of the rows wanted.
        rank: Rank of the gradients, reduced where a module's matrix has less; None: whole.

    Raises:
        ConfigError: A damping of zero where Λ has zeros.
        NonFiniteError: NaN or infinity was met.
        StoreError: A factor file is damaged.
    """
    world, lengths = context.world, queries.sequences.num_positions
    costs = [int(lengths[list(queries.rows[row])].sum()) for row in rows]
    own = [rows[k] for k in assign_batches(costs, world.size)[world.rank]]
    members = sorted(number for row in rows for number in queries.rows[row])
    limit = equal_lengths_above(context.model)
    numbers = [n for row in own for n in queries.rows[row]]
    batches = list(_in_order(numbers, lengths, context.batch_tokens, limit))
    observer = _QueryGradients(context, queries, list(rows), rank)
    # A view of this block alone, so that rates and losses are of it.
    position = {number: k for k, number in enumerate(members)}
    positions = [[position[number] for number in batch] for batch in batches]
    work = PassContext(
        context.model,
        queries.sequences.take(members),
        positions,
        world,
        context.dtype,
        context.show_progress,
        called="query {} (from 0)",
        wider=OVERFLOW_ADVICE,
        task=context.task,
    )
    state = PassState(positions, STORED)
    run_pass(name, work, context.modules, observer, DATA_LABELS, observer.on_loss, state=state)
    losses = observer.losses.tolist()
    return PreparedQueries(
        list(rows), observer.gradients, observer.self_influence, {n: losses[n] for n in members}
    )


def _in_order(
    numbers: Sequence[int], lengths: np.ndarray, batch_tokens: int, equal_above: int | None
) -> Iterator[list[int]]:
    """Cuts queries into batches in the order given, so that a row's queries follow each other."""
    batch: list[int] = []
    for number in numbers:
        length = int(lengths[number])
        longest = max([int(lengths[n]) for n in batch] + [length])
        fits = longest * (len(batch) + 1) <= batch_tokens
        if batch and not (fits and may_share(int(lengths[batch[-1]]), length, equal_above)):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


class _QueryGradients(PairObserver[CapturedPositions]):
    """The observer that makes preconditioned gradients of a block's own rows."""

    def __init__(
        self, context: ScoringContext, queries: QuerySet, rows: list[int], rank: int | None
    ) -> None:
        super().__init__(context.modules)
        self._context = context
        self._place = {row: k for k, row in enumerate(rows)}
        self._row_of = {number: row for row in rows for number in queries.rows[row]}
        self._members = {row: len(queries.rows[row]) for row in rows}
        # Sums of rows whose queries have not all been seen, and how many of them have been.
        self._pending: dict[tuple[str, int], tuple[Tensor, int]] = {}
        self._seen: dict[int, int] = {}
        self._total = context.zeros(dtype=torch.float64)
        self.self_influence = context.zeros(len(rows), dtype=torch.float64)
        self.losses = context.zeros(len(queries.sequences), dtype=torch.float64)
        self.gradients: dict[str, WholeGradients | LowRankGradients] = {
            module.name: empty_gradients(context, len(rows), module, rank)
            for module in context.modules
        }

    def prepare_input(
        self, module: TrackedModule, acts_Mi: Tensor, positions: CapturedPositions
    ) -> Tensor:
        """The input in the eigenbasis [M, I]."""
        basis = on(self._context.factors.module(module.name).blocks_II, acts_Mi)
        return rotate_rows(acts_Mi, basis, bias=module.bias)

    def on_pair(
        self,
        module: TrackedModule,
        acts: Tensor,
        grads_MO: Tensor,
        positions: CapturedPositions,
    ) -> None:
        """Sums each row's gradient, and finishes it with the row's last query."""
        fitted = self._context.at_device(module.name)
        grads_MO = rotate_rows(grads_MO, fitted.blocks_OO)
        start = 0
        parts: dict[int, list[slice]] = {}
        for number, length in zip(positions.indices, positions.lengths, strict=True):
            parts.setdefault(self._row_of[number], []).append(slice(start, start + length))
            start += length
        for row, slices in parts.items():
            whole = slice(slices[0].start, slices[-1].stop)  # a row's queries follow each other
            gradient_OI = grads_MO[whole].T @ acts[whole]
            before, seen = self._pending.pop((module.name, row), (None, 0))
            if before is not None:
                gradient_OI += before
            seen += len(slices)
            if seen < self._members[row]:
                self._pending[module.name, row] = (gradient_OI, seen)
                continue
            self._finish(module, row, gradient_OI, fitted)

    def _finish(
        self,
        module: TrackedModule,
        row: int,
        gradient_OI: Tensor,
        fitted: ModuleFactors,
    ) -> None:
        solved_OI = gradient_OI / self._context.damped(module.name, fitted)
        place = self._place[row]
        own = (gradient_OI * solved_OI).sum(dtype=torch.float64)
        self.self_influence[place] += own
        self._total += own
        into = self.gradients[module.name]
        rotates_back = not self._context.in_eigenbasis
        if isinstance(into, WholeGradients):
            if rotates_back:
                solved_OI = rotate_back(solved_OI, fitted.blocks_OO, fitted.blocks_II)
            into.put_(place, solved_OI)
            return
        if not torch.isfinite(own):
            return  # nothing to decompose; `health` tells of it
        # The bases are orthogonal, so the best approximation may be found on either side of them.
        left_Or, right_Ir = products.low_rank(solved_OI, into.left_QOr.shape[-1])
        if rotates_back:
            left_Or = rotate_columns_back(left_Or, fitted.blocks_OO)
            right_Ir = rotate_columns_back(right_Ir, fitted.blocks_II)
        into.left_QOr[place], into.right_QIr[place] = left_Or, right_Ir

    def on_loss(self, batch: Batch, losses_B: Tensor) -> None:
        """Takes −log p of each query of a batch, and finishes rows of which a module saw a part.

        An expert sees only the queries that tokens of were routed to it.
        """
        self.losses[list(batch.indices)] = losses_B
        for number in batch.indices:
            row = self._row_of[number]
            self._seen[row] = self._seen.get(row, 0) + 1
        done = {row for row, seen in self._seen.items() if seen == self._members[row]}
        for name, row in [key for key in self._pending if key[1] in done]:
            gradient_OI, _ = self._pending.pop((name, row))
            module = self._context.factors.modules[name]
            self._finish(module, row, gradient_OI, self._context.at_device(name))

    def health(self) -> Tensor:
        """Σ of all that was computed, which is finite only if everything is."""
        return self._total

    def reduce(self, world: World) -> None:
        """Gives every worker's rows to all; where a worker has none it holds zeros."""
        assert not self._pending
        world.all_reduce_([self.self_influence, self.losses])
        for gradients in self.gradients.values():
            world.all_reduce_(gradients.tensors())
