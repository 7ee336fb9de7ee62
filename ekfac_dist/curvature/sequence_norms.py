"""Norms of sequences' gradients in the inner product of (F + λ)⁻¹, for several λ at once.

    s(λ) = ⟨G, (F + λ)⁻¹ G⟩ = Σ_oi G_oi² / (Λ_oi + λ)        d(λ) = ‖(F + λ)⁻¹ G‖² = −s′(λ)

in the eigenbasis.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ekfac_dist.curvature.products import GradientTiles


def sequence_norms(
    tiles: GradientTiles,
    acts_MI: Tensor,
    grads_MO: Tensor,
    lengths: Sequence[int],
    lambda_OI: Tensor,
    mean: float,
    dampings: Sequence[float],
) -> Tensor:
    """m·s(λ) and m²·d(λ) of every sequence [n, 2, dampings], in the rows' dtype.

    With a number m of the size of Λ these are of the size of G², which a small Λ does not let
    overflow.

    Args:
        tiles: Forms the gradients.
        acts_MI: Inputs at each position in the eigenbasis, sequence after sequence.
        grads_MO: Output gradients at each position in the eigenbasis.
        lengths: Positions of each sequence; they sum to M.
        lambda_OI: Λ.
        mean: m.
        dampings: λ, as multiples of m.
    """
    sums_2dn = acts_MI.new_zeros(2, len(dampings), len(lengths))
    for part, rows, tile_noI in tiles.of(acts_MI, grads_MO, lengths):
        squares_fn = tile_noI.flatten(1).square_().T
        lambda_f = (lambda_OI[rows] / mean).flatten()
        inverse_df = torch.stack([lambda_f + damping for damping in dampings]).reciprocal_()
        sums_2dn[0, :, part].addmm_(inverse_df, squares_fn)
        sums_2dn[1, :, part].addmm_(inverse_df.square_(), squares_fn)
    return sums_2dn.permute(2, 0, 1)
