"""Preconditioned query gradients: P_q = (F + λ)⁻¹ ∇ of each row of queries, in every module.

The rows of a block are shared out over the workers; each computes its own, and a sum over workers
gives all of them to everyone. A module's factors are on the device only while they are used. A
gradient is finished, and compressed, as soon as the last query of its row has been seen.

Gradients are of the losses, −log p, on both sides of the inner product, so signs cancel: a positive
score means that more of the training sequence makes the query more likely.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ekfac_dist.curvature import products
from ekfac_dist.curvature.blocks import on, rotate_columns_back, rotate_rows
from ekfac_dist.curvature.kronecker import damped, rotate_back
from ekfac_dist.data.batches import Batch, CapturedPositions, assign_batches, may_share
from ekfac_dist.factors.factors import Factors, ModuleFactors
from ekfac_dist.influence.queries import QuerySet
from ekfac_dist.models.capture.labels import COVARIANCE_PASS, LabelRule
from ekfac_dist.models.capture.rotary import equal_lengths_above
from ekfac_dist.models.capture.tasks import CAUSAL_LM, Task
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.passes.one_pass import PassContext, run_pass
from ekfac_dist.passes.state import PassState
from ekfac_dist.runtime.processes import World

# Influence is of the labels that the data has, whichever the Fisher was fitted with.
DATA_LABELS = LabelRule("data", 0, COVARIANCE_PASS)
OVERFLOW_ADVICE = "Use model.dtype: float64"
# What is stored, in words, when SIGTERM ends a pass.
STORED = "blocks of queries that are finished are stored"


@dataclass(frozen=True)
class ScoringContext:
    """What query and training gradients have in common.

    Attributes:
        model: The prepared model, on the worker's device.
        factors: The factors.
        damping: λ of each module, absolute, by name.
        dtype: Precision of gradients and scores, float32 or float64.
        world: The workers.
        batch_tokens: Token budget of a batch.
        show_progress: Whether worker 0 shows progress.
        in_eigenbasis: Whether gradients are compared in the eigenbasis, into which training
            gradients then have to be rotated, instead of the parameters' own basis.
    """

    model: nn.Module
    factors: Factors
    damping: Mapping[str, float]
    dtype: torch.dtype
    world: World
    batch_tokens: int
    show_progress: bool
    in_eigenbasis: bool = False
    task: Task = CAUSAL_LM

    @property
    def modules(self) -> tuple[TrackedModule, ...]:
        """The tracked modules, in model order."""
        return tuple(self.factors.modules.values())

    @property
    def model_dtype(self) -> torch.dtype:
        """Of the model's own parameters."""
        return next(self.model.parameters()).dtype

    def zeros(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros where gradients are computed, in their dtype by default."""
        return torch.zeros(size, dtype=dtype or self.dtype, device=self.world.device)

    def damped(self, name: str, fitted: ModuleFactors) -> Tensor:
        """Λ + λ of a module [O, I]."""
        return damped(fitted.lambda_OI, self.damping[name])

    def at_device(self, name: str) -> ModuleFactors:
        """A module's factors where gradients are computed."""
        return self.factors.module(name).to(self.world.device, self.dtype)


@dataclass(frozen=True)
class WholeGradients:
    """A module's P of each row of a block: [Q, O, I]."""

    matrices_QOI: Tensor

    def position_scores(self, row: int, acts_MI: Tensor, grads_MO: Tensor) -> Tensor:
        """⟨P, g aᵀ⟩ of one row of the block at every position: [M]."""
        return products.position_scores(self.matrices_QOI[row], acts_MI, grads_MO)

    def all_position_scores(self, acts_MI: Tensor, grads_MO: Tensor) -> Tensor:
        """The same of every row of the block: [Q, M]."""
        return torch.stack(
            [
                products.position_scores(query_OI, acts_MI, grads_MO)
                for query_OI in self.matrices_QOI
            ]
        )

    def by_position(self, lengths: Sequence[int]) -> bool:
        """Whether scores of whole sequences cost less at each position: never."""
        return False

    def matrices(self, scratch: products.ScratchBuffer) -> Iterator[tuple[slice, Tensor]]:
        """(which rows, their P [q, O, I])."""
        yield slice(0, len(self.matrices_QOI)), self.matrices_QOI

    def tensors(self) -> list[Tensor]:
        """What is summed over workers."""
        return [self.matrices_QOI]

    def put_(self, row: int, matrix_OI: Tensor) -> None:
        """Takes the P of one row."""
        self.matrices_QOI[row] = matrix_OI


@dataclass(frozen=True)
class LowRankGradients:
    """A module's P ≈ U Vᵀ of each row of a block: U [Q, O, r], V [Q, I, r]."""

    left_QOr: Tensor
    right_QIr: Tensor

    def position_scores(self, row: int, acts_MI: Tensor, grads_MO: Tensor) -> Tensor:
        """⟨U Vᵀ, g aᵀ⟩ of one row of the block at every position: [M]."""
        one = slice(row, row + 1)
        return products.low_rank_position_scores(
            self.left_QOr[one], self.right_QIr[one], acts_MI, grads_MO
        )[0]

    def all_position_scores(self, acts_MI: Tensor, grads_MO: Tensor) -> Tensor:
        """The same of every row of the block: [Q, M]."""
        return products.low_rank_position_scores(self.left_QOr, self.right_QIr, acts_MI, grads_MO)

    def tensors(self) -> list[Tensor]:
        """What is summed over workers."""
        return [self.left_QOr, self.right_QIr]

    def by_position(self, lengths: Sequence[int]) -> bool:
        """Whether scores of whole sequences cost less at each position than multiplied out."""
        return products.low_rank_by_position(self.left_QOr, self.right_QIr, lengths)

    def matrices(self, scratch: products.ScratchBuffer) -> Iterator[tuple[slice, Tensor]]:
        """(which rows, their U Vᵀ [q, O, I]), a few at a time."""
        return products.query_matrices(self.left_QOr, self.right_QIr, scratch)


@dataclass
class PreparedQueries:
    """The preconditioned gradients of a block of rows, the same on every worker.

    Attributes:
        rows: Numbers of the rows of scores in the block.
        gradients: Of each module, all rows of the block.
        self_influence: ⟨∇, (F + λ)⁻¹ ∇⟩ of each row [Q], float64.
        losses: −log p of each query in the block, by its number, in nats.
    """

    rows: list[int]
    gradients: dict[str, WholeGradients | LowRankGradients]
    self_influence: Tensor
    losses: dict[int, float] = field(default_factory=dict)


def bytes_per_row(modules: Sequence[TrackedModule], rank: int | None, dtype: torch.dtype) -> int:
    """Memory of one row's gradients in all modules."""
    numbers = 0
    for module in modules:
        sizes = (module.num_outputs, module.input_size)
        whole = sizes[0] * sizes[1]
        numbers += whole if rank is None else min(rank, *sizes) * sum(sizes)
    return numbers * dtype.itemsize


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


class _QueryGradients:
    """The observer that makes preconditioned gradients of a block's own rows."""

    def __init__(
        self, context: ScoringContext, queries: QuerySet, rows: list[int], rank: int | None
    ) -> None:
        self._context = context
        self._place = {row: k for k, row in enumerate(rows)}
        self._row_of = {number: row for row in rows for number in queries.rows[row]}
        self._members = {row: len(queries.rows[row]) for row in rows}
        # Sums of rows whose queries have not all been seen, and how many of them have been.
        self._pending: dict[tuple[str, int], tuple[Tensor, int]] = {}
        self._seen: dict[int, int] = {}
        self._acts: dict[str, Tensor] = {}
        self._readers = Countdown(context.modules)
        self._total = context.zeros(dtype=torch.float64)
        self.self_influence = context.zeros(len(rows), dtype=torch.float64)
        self.losses = context.zeros(len(queries.sequences), dtype=torch.float64)
        self.gradients: dict[str, WholeGradients | LowRankGradients] = {
            module.name: _empty(context, len(rows), module, rank) for module in context.modules
        }

    def on_input(self, module: TrackedModule, rows_Mi: Tensor, batch: CapturedPositions) -> None:
        """Keeps a batch's inputs, in the eigenbasis, until the gradients come."""
        basis = on(self._context.factors.module(module.name).blocks_II, rows_Mi)
        self._acts[module.input] = rotate_rows(rows_Mi, basis, bias=module.bias)

    def on_gradient(self, module: TrackedModule, rows_MO: Tensor, batch: CapturedPositions) -> None:
        """Sums each row's gradient, and finishes it with the row's last query."""
        fitted = self._context.at_device(module.name)
        acts_MI = self._acts[module.input]
        grads_MO = rotate_rows(rows_MO, fitted.blocks_OO)
        start = 0
        parts: dict[int, list[slice]] = {}
        for number, length in zip(batch.indices, batch.lengths, strict=True):  # all have labels
            parts.setdefault(self._row_of[number], []).append(slice(start, start + length))
            start += length
        for row, slices in parts.items():
            whole = slice(slices[0].start, slices[-1].stop)  # a row's queries follow each other
            gradient_OI = grads_MO[whole].T @ acts_MI[whole]
            before, seen = self._pending.pop((module.name, row), (None, 0))
            if before is not None:
                gradient_OI += before
            seen += len(slices)
            if seen < self._members[row]:
                self._pending[module.name, row] = (gradient_OI, seen)
                continue
            self._finish(module, row, gradient_OI, fitted)
        if self._readers.is_last(module):
            del self._acts[module.input]

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


class Countdown:
    """Tells when the last module that shares an input has been served."""

    def __init__(self, modules: Sequence[TrackedModule]) -> None:
        self._readers: dict[str, int] = {}
        for module in modules:
            self._readers[module.input] = self._readers.get(module.input, 0) + 1
        self._left = dict(self._readers)

    def is_last(self, module: TrackedModule) -> bool:
        """Counts a module; True, and begins anew, if it was the last of its input's."""
        self._left[module.input] -= 1
        if self._left[module.input]:
            return False
        self._left[module.input] = self._readers[module.input]
        return True


def _empty(
    context: ScoringContext, num_rows: int, module: TrackedModule, rank: int | None
) -> WholeGradients | LowRankGradients:
    num_outputs, num_inputs = module.num_outputs, module.input_size
    if rank is None:
        return WholeGradients(context.zeros(num_rows, num_outputs, num_inputs))
    rank = min(rank, num_outputs, num_inputs)
    return LowRankGradients(
        context.zeros(num_rows, num_outputs, rank), context.zeros(num_rows, num_inputs, rank)
    )
