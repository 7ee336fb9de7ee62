"""Preconditioned query gradients P = (F + λ)⁻¹ ∇, held as whole matrices or at low rank.

    whole       P                   [Q, O, I]
    low rank    P ≈ U Vᵀ            [Q, O, r] and [Q, I, r]

Q counts the query groups of a block, those whose gradients are in memory together. A group's slot
is its index in the block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ekfac_dist.curvature import products
from ekfac_dist.influence.context import ScoringContext
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.passes.owners import Places


@dataclass(frozen=True)
class WholeGradients:
    """P of one module, for each query group of a block.

    Attributes:
        matrices_QOI: The matrices.
    """

    matrices_QOI: Tensor

    def position_scores(self, slot: int, acts_MI: Tensor, grads_MO: Tensor) -> Tensor:
        """⟨P, g aᵀ⟩ at every position for one query group [M].

        Args:
            slot: The group's index in the block.
            acts_MI: Inputs a.
            grads_MO: Output-gradients g.
        """
        return products.position_scores(self.matrices_QOI[slot], acts_MI, grads_MO)

    def matrix(self, slot: int) -> Tensor:
        """P of one query group [O, I]."""
        return self.matrices_QOI[slot]

    def all_position_scores(self, acts_MI: Tensor, grads_MO: Tensor) -> Tensor:
        """⟨P, g aᵀ⟩ at every position for all query groups [Q, M]."""
        return torch.stack(
            [
                products.position_scores(query_OI, acts_MI, grads_MO)
                for query_OI in self.matrices_QOI
            ]
        )

    def by_position(self, lengths: Sequence[int], are_formed: bool) -> bool:
        """Whether sequences are scored faster as sums over positions than from their gradients.

        Args:
            lengths: Positions of each sequence of the batch.
            are_formed: Whether the sequences' gradients are formed anyway.
        """
        return products.by_position(len(self.matrices_QOI), lengths, are_formed)

    def rows_of(
        self, rows: slice, scratch: products.ScratchBuffer
    ) -> Iterator[tuple[slice, Tensor]]:
        """(slots, some rows of their P [q, o, I]), all query groups at once."""
        yield slice(0, len(self.matrices_QOI)), self.matrices_QOI[:, rows]

    def tensors(self) -> list[Tensor]:
        """The tensors that are summed over workers."""
        return [self.matrices_QOI]

    def put_(self, slot: int, matrix_OI: Tensor) -> None:
        """Sets the P of one query group."""
        self.matrices_QOI[slot] = matrix_OI


@dataclass(frozen=True)
class LowRankGradients:
    """P ≈ U Vᵀ of one module, for each query group of a block.

    Attributes:
        left_QOr: U.
        right_QIr: V.
    """

    left_QOr: Tensor
    right_QIr: Tensor

    def position_scores(self, slot: int, acts_MI: Tensor, grads_MO: Tensor) -> Tensor:
        """⟨U Vᵀ, g aᵀ⟩ at every position for one query group [M].

        Args:
            slot: The group's index in the block.
            acts_MI: Inputs a.
            grads_MO: Output-gradients g.
        """
        group = slice(slot, slot + 1)
        return products.low_rank_position_scores(
            self.left_QOr[group], self.right_QIr[group], acts_MI, grads_MO
        )[0]

    def matrix(self, slot: int) -> Tensor:
        """U Vᵀ of one query group [O, I]."""
        return self.left_QOr[slot] @ self.right_QIr[slot].T

    def all_position_scores(self, acts_MI: Tensor, grads_MO: Tensor) -> Tensor:
        """⟨U Vᵀ, g aᵀ⟩ at every position for all query groups [Q, M]."""
        return products.low_rank_position_scores(self.left_QOr, self.right_QIr, acts_MI, grads_MO)

    def tensors(self) -> list[Tensor]:
        """The tensors that are summed over workers."""
        return [self.left_QOr, self.right_QIr]

    def by_position(self, lengths: Sequence[int], are_formed: bool) -> bool:
        """Whether sequences are scored faster as sums over positions than with U Vᵀ multiplied out.

        Args:
            lengths: Positions of each sequence of the batch.
            are_formed: Whether the sequences' gradients are formed anyway.
        """
        return products.low_rank_by_position(self.left_QOr, self.right_QIr, lengths, are_formed)

    def rows_of(
        self, rows: slice, scratch: products.ScratchBuffer
    ) -> Iterator[tuple[slice, Tensor]]:
        """(slots, some rows of their U Vᵀ [q, o, I]), a few query groups at a time.

        They are in one scratch buffer.
        """
        return products.query_rows(self.left_QOr, self.right_QIr, rows, scratch)


@dataclass
class PreparedQueries:
    """The preconditioned gradients of a block of query groups.

    Attributes:
        groups: Index of each query group of the block, by slot.
        gradients: The gradients in each module that this worker holds, by its name.
        self_influence: ⟨∇, (F + λ)⁻¹ ∇⟩ of each group [Q], float64.
        losses: −log p of each sequence of the block's queries, by its index, in nats.
    """

    groups: list[int]
    gradients: dict[str, WholeGradients | LowRankGradients]
    self_influence: Tensor
    losses: dict[int, float] = field(default_factory=dict)


def rank_in(module: TrackedModule, rank: int) -> int:
    """The rank of gradients in a module: the one asked for, or the module's own if less."""
    return min(rank, module.num_outputs, module.input_size)


def bytes_per_group(
    modules: Sequence[TrackedModule], rank: int | None, dtype: torch.dtype, shard: int = 1
) -> int:
    """Memory of one query group's gradients on the worker that holds most of them, in bytes.

    Args:
        modules: The tracked modules.
        rank: Rank of the gradients; None: whole matrices.
        dtype: Their dtype.
        shard: Among how many workers the modules are shared out.
    """
    places = Places.of(modules, shard)
    num_elements = [0] * shard
    for module in modules:
        sizes = (module.num_outputs, module.input_size)
        whole = sizes[0] * sizes[1]
        held = whole if rank is None else rank_in(module, rank) * sum(sizes)
        num_elements[places.of_module(module)] += held
    return max(num_elements) * dtype.itemsize


def empty_gradients(
    context: ScoringContext, num_groups: int, module: TrackedModule, rank: int | None
) -> WholeGradients | LowRankGradients:
    """Zeros for the gradients of all query groups of a block in one module.

    Args:
        context: Gives their device and dtype.
        num_groups: Q, the query groups of the block.
        module: The module.
        rank: Their rank, reduced to the module's own where that is less; None: whole matrices.
    """
    num_outputs, num_inputs = module.num_outputs, module.input_size
    if rank is None:
        return WholeGradients(context.zeros(num_groups, num_outputs, num_inputs))
    rank = rank_in(module, rank)
    return LowRankGradients(
        context.zeros(num_groups, num_outputs, rank), context.zeros(num_groups, num_inputs, rank)
    )


def at_rank(context: ScoringContext, whole: PreparedQueries, rank: int) -> PreparedQueries:
    """Whole gradients of one query group, reduced to a rank, quickly.

    Args:
        context: Gives the modules.
        whole: The gradients.
        rank: The rank, reduced to a module's own where that is less.
    """
    gradients: dict[str, Any] = {}
    for module in context.own_modules:
        matrix_OI = whole.gradients[module.name].matrix(0)
        left, right = products.low_rank(matrix_OI, rank_in(module, rank), quickly=True)
        gradients[module.name] = LowRankGradients(left[None], right[None])
    return replace(whole, gradients=gradients)


def joined(parts: Sequence[PreparedQueries]) -> PreparedQueries:
    """Gradients of query groups, one each, as those of one block.

    Args:
        parts: The gradients of each group, all whole or all of one rank.
    """
    if len(parts) == 1:
        return replace(parts[0], groups=[0])
    gradients: dict[str, Any] = {}
    for name, first in parts[0].gradients.items():
        own: list[list[Tensor]] = [part.gradients[name].tensors() for part in parts]
        gradients[name] = type(first)(*map(torch.cat, zip(*own, strict=True)))
    losses = {sequence: loss for part in parts for sequence, loss in part.losses.items()}
    self_influence = torch.cat([part.self_influence for part in parts])
    return PreparedQueries(list(range(len(parts))), gradients, self_influence, losses)
