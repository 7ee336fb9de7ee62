"""Preconditioned query gradients of a module: whole matrices, or products of low rank."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ekfac_dist.curvature import products
from ekfac_dist.influence.context import ScoringContext
from ekfac_dist.models.modules import TrackedModule


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


def empty_gradients(
    context: ScoringContext, num_rows: int, module: TrackedModule, rank: int | None
) -> WholeGradients | LowRankGradients:
    """Zeros for a module's gradients of all rows of a block.

    Args:
        context: Where they are held, and in which dtype.
        num_rows: Rows of the block.
        module: The module.
        rank: Their rank, reduced where the module's matrix has less; None: whole matrices.
    """
    num_outputs, num_inputs = module.num_outputs, module.input_size
    if rank is None:
        return WholeGradients(context.zeros(num_rows, num_outputs, num_inputs))
    rank = min(rank, num_outputs, num_inputs)
    return LowRankGradients(
        context.zeros(num_rows, num_outputs, rank), context.zeros(num_rows, num_inputs, rank)
    )
