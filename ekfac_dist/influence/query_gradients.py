"""Computes preconditioned query gradients, P_q = (F + λ)⁻¹ ∇_q, in every module.

∇_q is the gradient of a query group's loss; what a contrast is against is a sequence of the group
whose gradient is subtracted. The groups of a block are shared out over the workers;
each runs its own through the model, and a sum over workers gives all of them to every worker. Where
modules are shared out too, the gradients of a copy's groups are computed by the modules' owners,
and summed over the owners of the same modules in all copies. A gradient is preconditioned, and
reduced to low rank, as soon as the last query of its group has been through the model.

Query gradients and training gradients are both of losses, −log p, so that the signs cancel in their
product: a positive score means that more of the training sequence makes the query more likely.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.curvature import products
from ekfac_dist.curvature.blocks import rotate_columns_back
from ekfac_dist.curvature.kronecker import rotate_back
from ekfac_dist.data.batch_plan import assign_batches, may_share
from ekfac_dist.data.batches import Batch, CapturedPositions
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
    name: str,
    context: ScoringContext,
    queries: QuerySet,
    groups: Sequence[int],
    rank: int | None,
    *,
    solved: bool = True,
) -> PreparedQueries:
    """Computes the preconditioned gradients of a block of query groups; a collective.

    Args:
        name: The pass's name in progress and errors.
        context: Model, factors, damping, workers.
        queries: All queries.
        groups: Indices of the block's query groups.
        rank: Rank of the gradients, reduced to a module's own where that is less; None: whole.
        solved: Whether they are multiplied by (F + λ)⁻¹; if not, they are ∇ itself.

    Raises:
        ConfigError: If damping is zero where Λ has zeros.
        NonFiniteError: If NaN or infinity appears.
        StoreError: If a factor file is damaged.
    """
    world, lengths = context.world, queries.sequences.num_positions
    costs = [int(lengths[queries.sequences_of(group)].sum()) for group in groups]
    limit = equal_lengths_above(context.model)

    def batches_of(own: Sequence[int]) -> list[list[int]]:
        own_sequences = [one for k in own for one in queries.sequences_of(groups[k])]
        return list(_batches_in_order(own_sequences, lengths, context.batch_tokens, limit))

    batches_by_rank = [batches_of(own) for own in assign_batches(costs, world.size)]
    batches = batches_by_rank[world.rank]
    in_copy = [batches_by_rank[rank] for rank in context.copy_ranks]
    steps = [list(chain(*step)) for step in zip_longest(*in_copy, fillvalue=())]
    observer = _QueryGradients(context, queries, list(groups), rank, steps, solved)
    # The pass sees the sequences of this block only, so that its progress is the block's.
    in_block = sorted(one for group in groups for one in queries.sequences_of(group))
    index_in_block = {sequence: k for k, sequence in enumerate(in_block)}
    block_batches = [[index_in_block[sequence] for sequence in batch] for batch in batches]
    pass_context = PassContext(
        context.model,
        queries.sequences.take(in_block),
        block_batches,
        world,
        context.dtype,
        context.show_progress,
        called=queries.name_of,
        wider=OVERFLOW_ADVICE,
        task=context.task,
        owners=context.owners,
        checkpoints=context.checkpoints,
        row_order=context.row_order,
    )
    run_pass(
        name,
        pass_context,
        context.modules,
        observer,
        DATA_LABELS,
        observer.on_loss,
        on_step=observer.on_step,
        converted=not context.fitted.splits,
        state=PassState(block_batches, STORED),
    )
    losses = observer.losses.tolist()
    return PreparedQueries(
        list(groups),
        observer.gradients,
        observer.self_influence,
        {sequence: losses[sequence] for sequence in in_block},
    )


def _batches_in_order(
    sequences: Sequence[int], lengths: np.ndarray, batch_tokens: int, equal_above: int | None
) -> Iterator[list[int]]:
    """Batches of sequences in the order given, in which those of a group stay together.

    Args:
        sequences: Indices of the queries' sequences.
        lengths: Positions of every sequence, by its index.
        batch_tokens: Token budget of a batch, padding included.
        equal_above: Longer ones share a batch only with others of their length; None: with any.
    """
    batch: list[int] = []
    for sequence in sequences:
        length = int(lengths[sequence])
        longest = max([int(lengths[other]) for other in batch] + [length])
        fits = longest * (len(batch) + 1) <= batch_tokens
        if batch and not (fits and may_share(int(lengths[batch[-1]]), length, equal_above)):
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


class _QueryGradients(PairObserver[CapturedPositions]):
    """The observer that computes preconditioned gradients, of this worker's query groups or copy's.

    Args:
        context: Model, factors, damping, workers.
        queries: All queries.
        groups: Indices of the block's query groups; a group's slot is its index among them.
        rank: Rank of the gradients; None: whole.
        steps: Indices of the sequences that this worker, or all of its copy, run in each step.
        solved: Whether gradients are multiplied by (F + λ)⁻¹.

    Attributes:
        gradients: The gradients in each module that this worker holds, by its name; zero in slots
            of other copies.
        self_influence: ⟨∇, (F + λ)⁻¹ ∇⟩ of each group in these modules [Q], float64.
        losses: −log p of every sequence of the queries, by its index, float64.
    """

    def __init__(
        self,
        context: ScoringContext,
        queries: QuerySet,
        groups: list[int],
        rank: int | None,
        steps: Sequence[Sequence[int]],
        solved: bool,
    ) -> None:
        super().__init__(context.modules)
        self._context, self._solved = context, solved
        self._slots = {group: slot for slot, group in enumerate(groups)}
        self._is_subtracted = queries.is_subtracted
        sequences = {group: queries.sequences_of(group) for group in groups}
        self._group_of = {one: group for group in groups for one in sequences[group]}
        self._num_sequences = {group: len(sequences[group]) for group in groups}
        # By (module, group): sums over sequences that a module has seen, and how many those are.
        self._partial_sums: dict[tuple[str, int], tuple[Tensor, int]] = {}
        self._steps = iter(steps)
        self._num_done = Counter[int]()  # sequences of each group that went through the model
        self._total = context.zeros(dtype=torch.float64)
        self.self_influence = context.zeros(len(groups), dtype=torch.float64)
        self.losses = context.zeros(len(queries.sequences), dtype=torch.float64)
        self.gradients: dict[str, WholeGradients | LowRankGradients] = {
            module.name: empty_gradients(context, len(groups), module, rank)
            for module in context.own_modules
        }

    def prepare_input(
        self, module: TrackedModule, acts_Mi: Tensor, positions: CapturedPositions
    ) -> Tensor:
        """The input in the eigenbasis [M, I]."""
        return self._context.fitted.rotated_input(module, acts_Mi)

    def on_pair(
        self,
        module: TrackedModule,
        acts: Tensor,
        grads_MO: Tensor,
        positions: CapturedPositions,
    ) -> None:
        """Sums each group's gradient, and preconditions it with the group's last sequence."""
        grads_MO = self._context.fitted.rotated_gradient(module, grads_MO)
        start = 0
        parts: dict[int, list[slice]] = {}
        for sequence, length in zip(positions.indices, positions.lengths, strict=True):
            own = slice(start, start + length)
            parts.setdefault(self._group_of[sequence], []).append(own)
            if self._is_subtracted(sequence):
                grads_MO[own].neg_()
            start += length
        for group, slices in parts.items():
            whole = slice(slices[0].start, slices[-1].stop)  # a group's sequences are adjacent
            gradient_OI = grads_MO[whole].T @ acts[whole]
            earlier_OI, num_seen = self._partial_sums.pop((module.name, group), (None, 0))
            if earlier_OI is not None:
                gradient_OI += earlier_OI
            num_seen += len(slices)
            if num_seen < self._num_sequences[group]:
                self._partial_sums[module.name, group] = (gradient_OI, num_seen)
                continue
            self._precondition(module, group, gradient_OI)

    def _precondition(self, module: TrackedModule, group: int, gradient_OI: Tensor) -> None:
        """Stores (F + λ)⁻¹ ∇, or ∇, of one module.

        Args:
            module: The module.
            group: The query group.
            gradient_OI: ∇, in the eigenbasis.
        """
        fitted = self._context.fitted
        solved_OI = gradient_OI / self._context.damped(module)
        slot = self._slots[group]
        self_influence = (gradient_OI * solved_OI).sum(dtype=torch.float64)
        self.self_influence[slot] += self_influence
        self._total += self_influence
        if not self._solved:
            solved_OI = gradient_OI
        gradients = self.gradients[module.name]
        rotates_back = not self._context.in_eigenbasis
        if isinstance(gradients, WholeGradients):
            if rotates_back:
                bases = fitted.output_basis(module), fitted.input_basis(module)
                solved_OI = rotate_back(solved_OI, *bases)
            gradients.put_(slot, solved_OI)
            return
        if not torch.isfinite(self_influence):
            return  # it cannot be decomposed; the pass ends with an error, by `health`
        # The bases are orthogonal, so the best approximation may be found on either side of them.
        left_Or, right_Ir = products.low_rank(solved_OI, gradients.left_QOr.shape[-1])
        if rotates_back:
            left_Or = rotate_columns_back(left_Or, fitted.output_basis(module))
            right_Ir = rotate_columns_back(right_Ir, fitted.input_basis(module))
        gradients.left_QOr[slot], gradients.right_QIr[slot] = left_Or, right_Ir

    def on_loss(self, batch: Batch, losses_B: Tensor) -> None:
        """Takes −log p of each sequence of a batch."""
        self.losses[list(batch.indices)] = losses_B

    def on_step(self) -> None:
        """Finishes the groups that are complete with a step.

        An expert sees only the sequences that have tokens routed to it. So where a group's have all
        gone through the model, the sums of such a module are complete too.
        """
        self._num_done.update(self._group_of[sequence] for sequence in next(self._steps, ()))
        wanted = self._num_sequences
        done = {group for group, number in self._num_done.items() if number == wanted[group]}
        for name, group in [key for key in self._partial_sums if key[1] in done]:
            gradient_OI, _ = self._partial_sums.pop((name, group))
            self._precondition(self._context.factors.modules[name], group, gradient_OI)

    def health(self) -> Tensor:
        """A scalar that is finite exactly as long as all gradients are."""
        return self._total

    def reduce(self, world: World) -> None:
        """Adds up over all workers what each has; gradients over those with the same modules."""
        assert not self._partial_sums
        self._context.world.all_reduce_([self.self_influence, self.losses])
        for gradients in self.gradients.values():
            world.all_reduce_(gradients.tensors())
