"""Corrected eigenvalues: sums of (Q_Sᵀ G_n Q_A)∘² over sequences, or over positions.

Both sides of G_n = Σ_t g_t a_tᵀ must be rotated once, and each can be rotated before the sum over
positions is taken (its rows) or after (the matrix G_n). Per sequence of T positions, in
multiply–add pairs:

    input side, rows     T·I²  (once for all modules that share the input)    matrix   O·I²
    output side, rows    T·O²                                                 matrix   I·O²
    the sum itself       T·I·O either way

The two choices are independent and each is exact, so each side takes the cheaper one. Where every
sequence has one position, both sides' rows are rotated and the sum is one product of squares, as it
is for positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ekfac_dist.curvature.blocks import Blocks, rotate_columns, rotate_rows


def add_sequence_squares_(
    lambda_OI: Tensor,
    acts_MI: Tensor,
    grads_MO: Tensor,
    lengths: Sequence[int],
    *,
    basis_II: Blocks | None,
    basis_OO: Blocks | None,
    bias: bool,
) -> None:
    """Adds Σ_n (Q_Sᵀ G_n Q_A)∘² to a running sum, in place.

    Args:
        lambda_OI: Running sum [O, I].
        acts_MI: Input rows, sequence after sequence: already in the eigenbasis [M, I] where
            `basis_II` is None, else as captured, without the bias coordinate.
        grads_MO: Output-gradient rows [M, O]; already in the eigenbasis where `basis_OO` is None.
        lengths: Number of rows of each sequence; they sum to M.
        basis_II: The blocks of Q_A, if the input side is still to be rotated.
        basis_OO: The blocks of Q_S, if the output side is still to be rotated.
        bias: Whether the module has a bias (used only with `basis_II`).
    """
    if basis_II is None and basis_OO is None and max(lengths, default=0) <= 1:
        add_position_squares_(lambda_OI, acts_MI, grads_MO)
        return
    start = 0
    product = torch.empty(
        grads_MO.shape[1], acts_MI.shape[1], dtype=lambda_OI.dtype, device=lambda_OI.device
    )
    for length in lengths:
        grads = grads_MO[start : start + length]
        torch.mm(grads.T, acts_MI[start : start + length], out=product)
        rotated = product
        if basis_II is not None:
            sums_O1 = grads.sum(0)[:, None] if bias else None  # the bias coordinate's column
            rotated = rotate_rows(product, basis_II, last=sums_O1)
        if basis_OO is not None:
            rotated = rotate_columns(rotated, basis_OO)
        lambda_OI.addcmul_(rotated, rotated)
        start += length


def add_position_squares_(lambda_OI: Tensor, acts_MI: Tensor, grads_MO: Tensor) -> None:
    """Adds Σ_t ((Q_Sᵀ g_t)(Q_Aᵀ a_t)ᵀ)∘² to a running sum, in place.

    Args:
        lambda_OI: Running sum [O, I].
        acts_MI: Input rows in the eigenbasis [M, I].
        grads_MO: Output-gradient rows in the eigenbasis [M, O].
    """
    lambda_OI.addmm_(grads_MO.square().T, acts_MI.square())
