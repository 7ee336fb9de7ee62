"""Eigenvalue correction: sums of (Q_Sᵀ G_n Q_A)∘² over sequences, or over positions.

Both sides of G_n = Σ_t g_t a_tᵀ must be rotated once. Each can be rotated before the sum over
positions (the vectors a_t or g_t) or after it (the matrix G_n). Costs per sequence of T positions,
in multiply–add pairs:

                      before the sum                          after the sum
    input side        T·I², once for all modules that         O·I²
                      share the input
    output side       T·O²                                    I·O²
    the sum itself    T·I·O                                   T·I·O

The two choices are independent and each is exact, so each side takes the cheaper one. Where every
sequence has one position, both sides are rotated before, and the sum becomes one product of
squares, as it is for sums over positions. Where both are rotated before on a GPU, one kernel does
the rest: see `triton_squares`.

For `halves`, the same squares are summed over the even sequences alone, in a few rows of Λ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import accumulate, compress, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.curvature.blocks import Blocks, rotate_columns, rotate_rows
from ekfac_dist.curvature.halves import even_mask, in_chunks

if TYPE_CHECKING:  # Triton is not everywhere
    from ekfac_dist.curvature.triton_squares import SquaresKernel


@dataclass(frozen=True)
class EvenSquares:
    """Where the squares of a batch's even sequences are summed, in some rows of Λ.

    Attributes:
        sums_kI: Running sum, float64.
        rows_k: Indices of the rows of Λ, int64.
        are_even: Whether each sequence is an even one [B].
    """

    sums_kI: Tensor
    rows_k: Tensor
    are_even: Sequence[bool]

    def add_positions(self, acts_MI: Tensor, grads_MO: Tensor, lengths: Sequence[int]) -> None:
        """Adds Σ_t ((Q_Sᵀ g_t)(Q_Aᵀ a_t)ᵀ)∘² over the positions of the even sequences.

        Args:
            acts_MI: Inputs at each position in the eigenbasis, sequence after sequence.
            grads_MO: Output gradients at each position in the eigenbasis.
            lengths: Positions of each sequence; they sum to M.
        """
        even_m = torch.from_numpy(np.flatnonzero(even_mask(self.are_even, lengths)))
        even_m = even_m.to(acts_MI.device, non_blocking=True)
        for positions, acts_mI in in_chunks(acts_MI, even_m):
            grads_mk = grads_MO[positions[:, None], self.rows_k]
            self.sums_kI.add_(grads_mk.square().T @ acts_mI.square())


def add_sequence_squares_(
    lambda_OI: Tensor,
    acts_MI: Tensor,
    grads_MO: Tensor,
    lengths: Sequence[int],
    *,
    basis_II: Blocks | None,
    basis_OO: Blocks | None,
    bias: bool,
    even: EvenSquares | None = None,
) -> None:
    """Adds Σ_n (Q_Sᵀ G_n Q_A)∘² to a running sum, in place.

    Args:
        lambda_OI: Running sum [O, I].
        acts_MI: Inputs at each position, sequence after sequence: in the eigenbasis [M, I] where
            `basis_II` is None, else as captured, without the bias coordinate.
        grads_MO: Output gradients at each position, in the eigenbasis where `basis_OO` is None.
        lengths: Positions of each sequence; they sum to M.
        basis_II: The blocks of Q_A; None if the inputs are rotated already.
        basis_OO: The blocks of Q_S; None if the output gradients are rotated already.
        bias: Whether the module has a bias (used only with `basis_II`).
        even: Takes the squares of the even sequences; None: nothing does.
    """
    if basis_II is None and basis_OO is None and max(lengths, default=0) <= 1:
        add_position_squares_(lambda_OI, acts_MI, grads_MO)
        if even is not None:
            even.add_positions(acts_MI, grads_MO, lengths)
        return
    if basis_II is None and basis_OO is None and lambda_OI.dtype == torch.float32:
        kernel = squares_kernel(lambda_OI.device)
        if not isinstance(kernel, str):
            _add_by_kernel_(kernel, lambda_OI, acts_MI, grads_MO, lengths, even)
            return
    start = 0
    few_kI = None if even is None else torch.zeros_like(even.sums_kI, dtype=lambda_OI.dtype)
    product = torch.empty(
        grads_MO.shape[1], acts_MI.shape[1], dtype=lambda_OI.dtype, device=lambda_OI.device
    )
    for number, length in enumerate(lengths):
        grads = grads_MO[start : start + length]
        torch.mm(grads.T, acts_MI[start : start + length], out=product)
        rotated = product
        if basis_II is not None:
            sums_O1 = grads.sum(0)[:, None] if bias else None  # the bias coordinate's column
            rotated = rotate_rows(product, basis_II, last=sums_O1)
        if basis_OO is not None:
            rotated = rotate_columns(rotated, basis_OO)
        lambda_OI.addcmul_(rotated, rotated)
        if even is not None and few_kI is not None and even.are_even[number]:
            few = rotated[even.rows_k]
            few_kI.addcmul_(few, few)
        start += length
    if even is not None and few_kI is not None:
        even.sums_kI.add_(few_kI)


@cache
def squares_kernel(device: torch.device) -> "SquaresKernel | str":
    """The kernel that adds squares of sequences' gradients on a device; or why there is none."""
    if device.type != "cuda":
        return "it is for GPUs"
    if find_spec("triton") is None:
        return "Triton is not installed"
    from ekfac_dist.curvature import triton_squares

    return triton_squares.tried(device)


def _add_by_kernel_(
    kernel: "SquaresKernel",
    lambda_OI: Tensor,
    acts_MI: Tensor,
    grads_MO: Tensor,
    lengths: Sequence[int],
    even: EvenSquares | None,
) -> None:
    bounds = list(pairwise(accumulate(lengths, initial=0)))
    kernel.add_(lambda_OI, acts_MI, grads_MO, bounds)
    if even is not None:
        few_kI = torch.zeros_like(even.sums_kI, dtype=lambda_OI.dtype)
        of_even = list(compress(bounds, even.are_even))
        kernel.add_(few_kI, acts_MI, grads_MO[:, even.rows_k], of_even)
        even.sums_kI.add_(few_kI)


def add_position_squares_(lambda_OI: Tensor, acts_MI: Tensor, grads_MO: Tensor) -> None:
    """Adds Σ_t ((Q_Sᵀ g_t)(Q_Aᵀ a_t)ᵀ)∘² to a running sum, in place.

    Args:
        lambda_OI: Running sum [O, I].
        acts_MI: Inputs at each position in the eigenbasis.
        grads_MO: Output gradients at each position in the eigenbasis.
    """
    lambda_OI.addmm_(grads_MO.square().T, acts_MI.square())
