"""Gradients of sequences as sums of a few outer products, G_n ≈ Σ_c u_c v_cᵀ.

G_n = Bᵀ A with the T rows g_t of B and a_t of A, so it has rank T at most, and is never formed: the
best c products in the Frobenius norm come from the T × T matrices of inner products K_A = A Aᵀ and
K_B = B Bᵀ. A right singular vector is v = Aᵀ w with

    K_B K_A w = σ² w,        wᵀ K_A w = 1,        u = G_n v = Bᵀ K_A w.

Block power iteration for w starts from fixed numbers, so results repeat. It costs T²·(O + I) for
the inner products, a few per cent of rotating the rows, and T² a step.

They are the best in the plain norm. Best in that of (F + λ)^-½ G, or of what queries ask for, they
measured no closer to exact scores (docs/gradient-index.md), so no other norm is offered.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ekfac_dist.curvature.products import padded_by_sequence

_ITERATIONS = 8
_OVERSAMPLING = 4


def sequence_factors(
    acts_MI: Tensor,
    grads_MO: Tensor,
    lengths: Sequence[int],
    rank: int,
) -> tuple[Tensor, Tensor]:
    """G_n ≈ Σ_c u_c v_cᵀ of every sequence.

    Exact where a sequence has no more positions than the rank, or the rank is the module's own.

    Args:
        acts_MI: Inputs at each position, sequence after sequence, with the bias coordinate.
        grads_MO: Output gradients at each position, in the same order.
        lengths: Positions of each sequence; they sum to M.
        rank: c, the number of products, at most min(O, I).

    Returns:
        u [n, c, O] and v [n, c, I]; products that a sequence has no use for are zero.
    """
    num_outputs, num_inputs = grads_MO.shape[1], acts_MI.shape[1]
    left_ncO = grads_MO.new_zeros(len(lengths), rank, num_outputs)
    right_ncI = acts_MI.new_zeros(len(lengths), rank, num_inputs)
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    long = [n for n, length in enumerate(lengths) if length > rank]
    for n, length in enumerate(lengths):
        rows = slice(starts[n], starts[n + 1])
        if length <= rank:
            left_ncO[n, :length], right_ncI[n, :length] = grads_MO[rows], acts_MI[rows]
        elif rank == num_inputs:
            left_ncO[n] = acts_MI[rows].T @ grads_MO[rows]
            right_ncI[n].fill_diagonal_(1.0)
        elif rank == num_outputs:
            left_ncO[n].fill_diagonal_(1.0)
            right_ncI[n] = grads_MO[rows].T @ acts_MI[rows]
    if long and rank < min(num_outputs, num_inputs):
        if len(long) < len(lengths):
            positions = torch.cat([torch.arange(starts[n], starts[n + 1]) for n in long])
            positions = positions.to(acts_MI.device)
            acts_MI, grads_MO = acts_MI[positions], grads_MO[positions]
        which = torch.tensor(long, device=acts_MI.device)
        best = _best_products(acts_MI, grads_MO, [lengths[n] for n in long], rank)
        left_ncO[which], right_ncI[which] = best
    return left_ncO, right_ncI


def _best_products(
    acts_MI: Tensor,
    grads_MO: Tensor,
    lengths: Sequence[int],
    rank: int,
) -> tuple[Tensor, Tensor]:
    """The same for sequences of more positions than the rank."""
    # Rows of A of length one, the lengths given to B, whose largest number is one then: inner
    # products in float32 lose nothing beside a position with enormous inputs, nor overflow.
    sizes_M1 = torch.linalg.vector_norm(acts_MI, dim=1, keepdim=True)
    acts_nTI = padded_by_sequence(acts_MI / torch.where(sizes_M1 > 0, sizes_M1, 1.0), lengths)
    grads_nTO = padded_by_sequence(grads_MO * sizes_M1, lengths)
    largest_n11 = grads_nTO.abs().amax((1, 2), keepdim=True)
    are_finite_n11 = (
        torch.isfinite(largest_n11) & torch.isfinite(acts_nTI).all(2).all(1)[:, None, None]
    )
    largest_n11 = torch.where((largest_n11 > 0) & are_finite_n11, largest_n11, 1.0)
    # What is not finite has no products; whoever sums norms of the same rows finds it.
    acts_nTI = torch.where(are_finite_n11, acts_nTI, 0.0)
    grads_nTO = torch.where(are_finite_n11, grads_nTO / largest_n11, 0.0)
    products_nTT = (acts_nTI @ acts_nTI.mT).double()
    others_nTT = (grads_nTO @ grads_nTO.mT).double()
    size = min(products_nTT.shape[-1], rank + _OVERSAMPLING)
    generator = torch.Generator().manual_seed(0)
    start_Tk = torch.randn(products_nTT.shape[-1], size, generator=generator, dtype=torch.double)
    vectors_nTk = start_Tk.to(acts_MI.device).expand(len(lengths), -1, -1)
    for _ in range(_ITERATIONS):
        vectors_nTk = torch.linalg.qr(others_nTT @ (products_nTT @ vectors_nTk)).Q
    vectors_nTk = _orthonormal(vectors_nTk, products_nTT, torch.finfo(acts_MI.dtype).eps)
    images_nTk = products_nTT @ vectors_nTk  # rows of A v, so that G v = Bᵀ of them
    _, turned_nkk = torch.linalg.eigh(images_nTk.mT @ others_nTT @ images_nTk)
    best_nkc = turned_nkk.flip(-1)[..., :rank]
    right_ncI = (vectors_nTk @ best_nkc).mT.to(acts_MI) @ acts_nTI
    left_ncO = (images_nTk @ best_nkc).mT.to(grads_MO) @ grads_nTO * largest_n11
    return left_ncO, right_ncI


def _orthonormal(vectors_nTk: Tensor, products_nTT: Tensor, rounding: float) -> Tensor:
    """Vectors w of the same span with wᵀ K w = 1, zero where Aᵀ w spans fewer dimensions.

    Args:
        vectors_nTk: Orthonormal vectors.
        products_nTT: K.
        rounding: Relative rounding of its entries.
    """
    values_nk, turned_nkk = torch.linalg.eigh(vectors_nTk.mT @ products_nTT @ vectors_nTk)
    smallest_n1 = 8 * rounding * values_nk.amax(1, keepdim=True)
    kept_nk = (values_nk > smallest_n1) & (values_nk > 0)
    scale_nk = torch.where(kept_nk, torch.where(kept_nk, values_nk, 1.0).rsqrt(), 0.0)
    return vectors_nTk @ (turned_nkk * scale_nk[:, None])
