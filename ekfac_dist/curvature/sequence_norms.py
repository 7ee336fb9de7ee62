"""Norms of sequences' gradients in the inner product of (F + λ)⁻¹, for several λ at once.

    s(λ) = ⟨G, (F + λ)⁻¹ G⟩ = Σ_oi G_oi² / (Λ_oi + λ)        d(λ) = ‖(F + λ)⁻¹ G‖² = −s′(λ)

in the eigenbasis. G is formed a few rows at a time, which stay in the cache until they are used.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ekfac_dist.curvature.products import padded_by_sequence

_TILE_BYTES = 2**22


def sequence_norms(
    acts_MI: Tensor,
    grads_MO: Tensor,
    lengths: Sequence[int],
    lambda_OI: Tensor,
    dampings: Sequence[float],
) -> Tensor:
    """s(λ) and d(λ) of every sequence [n, 2, dampings], in the rows' dtype.

    Args:
        acts_MI: Inputs at each position in the eigenbasis, sequence after sequence.
        grads_MO: Output gradients at each position in the eigenbasis.
        lengths: Positions of each sequence; they sum to M.
        lambda_OI: Λ.
        dampings: λ, absolute.
    """
    acts_nTI = padded_by_sequence(acts_MI, lengths)
    grads_nTO = padded_by_sequence(grads_MO, lengths)
    num_outputs, num_inputs = lambda_OI.shape
    per_row = num_inputs * acts_MI.element_size() * (len(lengths) + len(dampings))
    step = max(1, _TILE_BYTES // per_row)
    sums_2dn = acts_MI.new_zeros(2, len(dampings), len(lengths))
    for first in range(0, num_outputs, step):
        rows = slice(first, first + step)
        squares_nf = torch.bmm(grads_nTO[..., rows].mT, acts_nTI).flatten(1).square_()
        lambda_f = lambda_OI[rows].flatten()
        inverse_df = torch.stack([lambda_f + damping for damping in dampings]).reciprocal_()
        sums_2dn[0] += inverse_df @ squares_nf.T
        sums_2dn[1] += inverse_df.square_() @ squares_nf.T
    return sums_2dn.permute(2, 0, 1)
