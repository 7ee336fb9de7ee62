"""How far factors of half of the data agree with those of all of it, from small sums over one half.

Sequences with an even index are one half of the data, those with an odd index the other. In each
pass something small is summed over the even ones alone; what the odd ones add is the rest of the
whole sum.

**From two halves to any part.** A factor X is a mean over sequences, which are taken to be drawn
independently: over n of them it is off by an error of variance c²/n. The means over the two halves,
of n_e and n_o sequences, differ by an error of variance c² (1/n_e + 1/n_o) = c² N / (n_e n_o), so

    δ = (X_even − X_odd) √(n_e n_o) / N        has variance c²/N,

and c²/n − c²/N is the variance of the difference between X over n of these sequences and X over all
N. So δ is as large as what half of the data is off (n = N/2), √(N/n − 1) · δ as what n of them are,
and δ/√2 as the difference from a fit on twice as many sequences (n = N, of 2N).

**A and S**: with the factor times a few fixed vectors w of random signs, E ‖δ w‖² = ‖δ‖², whatever
δ is (Hutchinson 1989).

What that changes of scores is in `score_change`.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.curvature.blocks import Blocks, bounds

NUM_VECTORS = 8
SEED = 20_230_807
_CHUNK_ELEMENTS = 2**22


def is_even(index: int) -> bool:
    """Whether a sequence is of the half that is summed.

    Args:
        index: The sequence's index in the data.
    """
    return index % 2 == 0


def even_mask(are_even: Sequence[bool], lengths: Sequence[int]) -> np.ndarray:
    """Which of a batch's positions are of even sequences [M], on the host.

    Args:
        are_even: Whether each sequence is an even one [B].
        lengths: Positions of each sequence, in order [B].
    """
    return np.repeat(np.asarray(are_even, dtype=bool), lengths)


def in_chunks(vectors_Mi: Tensor, chosen_m: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Copies of some of a matrix's rows, few at a time.

    Args:
        vectors_Mi: The matrix.
        chosen_m: Indices of rows.

    Yields:
        (indices, rows) of each chunk.
    """
    for rows in chosen_m.split(max(1, _CHUNK_ELEMENTS // vectors_Mi.shape[1])):
        if len(rows):
            yield rows, vectors_Mi[rows]


# -- A and S ---------------------------------------------------------------------------------------


def fixed_vectors(size: int, like: Tensor) -> Tensor:
    """The vectors of random signs [`NUM_VECTORS`, n], from `SEED`.

    Args:
        size: n.
        like: A tensor with the dtype and on the device wanted.
    """
    generator = torch.Generator().manual_seed(SEED)
    signs = 2 * torch.randint(0, 2, (NUM_VECTORS, size), generator=generator) - 1
    return signs.to(like.device, like.dtype)


def add_sketches_(
    sketches: Sequence[Tensor],
    vectors_Mi: Tensor,
    even_m: Tensor,
    numbers: Sequence[int],
    signs_kn: Tensor,
    block_sizes: Sequence[int],
) -> None:
    """Adds Σ_m (W x_m) x_mᵀ to the running sums of several factors, in place, block by block.

    (A CPU multiplies few long rows up to four times as fast as few long columns.)

    Args:
        sketches: Each factor's running sum [k, n], float64.
        vectors_Mi: Vectors of all of them [M, i], of any float dtype. Where n = i + 1 a 1 is
            appended to each.
        even_m: Which of the M vectors are summed, factor after factor.
        numbers: How many of those are each factor's.
        signs_kn: W, in the dtype that products are computed in.
        block_sizes: Sizes of the diagonal blocks of each; they sum to n.
    """
    num_columns, ends, start = vectors_Mi.shape[1], list(accumulate(numbers)), 0
    for _, few_mi in in_chunks(vectors_Mi, even_m):
        chunk_mi, stop = few_mi.to(signs_kn.dtype), start + len(few_mi)
        parts = {
            k: slice(max(end - number, start) - start, min(end, stop) - start)
            for k, (number, end) in enumerate(zip(numbers, ends, strict=True))
            if max(end - number, start) < min(end, stop)
        }
        sums_Fkn = chunk_mi.new_zeros(len(parts), *signs_kn.shape)
        for first, end in bounds(block_sizes):
            last = min(end, num_columns)
            columns_mb = chunk_mi[:, first:last]
            products_km = signs_kn[:, first:last] @ columns_mb.T
            if end > num_columns:  # the bias coordinate
                products_km += signs_kn[:, num_columns:]
            for sums_kn, own in zip(sums_Fkn, parts.values(), strict=True):
                torch.mm(products_km[:, own], columns_mb[own], out=sums_kn[:, first:last])
                if end > num_columns:
                    torch.sum(products_km[:, own], 1, out=sums_kn[:, num_columns])
        torch._foreach_add_([sketches[k] for k in parts], list(sums_Fkn.double()))
        start = stop


def relative_difference(
    even_kn: Tensor, num_even: int, blocks: Blocks, number: int
) -> float | None:
    """‖δ‖ / ‖X‖, Frobenius: how far a covariance of half of the positions is from that of all.

    Args:
        even_kn: The sum's sketch over the even sequences, from `add_sketches_`.
        num_even: Positions in it.
        blocks: The whole sum, block by block, in both triangles.
        number: Positions in that.

    Returns:
        An estimate; None where a half has no position, the sum is zero, or products overflow.
    """
    num_odd = number - num_even
    signs_kn = fixed_vectors(even_kn.shape[1], blocks[0])
    squares = total = 0.0
    for block, (start, end) in zip(blocks, bounds([len(b) for b in blocks]), strict=True):
        all_kb = (signs_kn[:, start:end] @ block).double()
        even_kb = even_kn[:, start:end]
        if num_even and num_odd:
            difference_kb = even_kb / num_even - (all_kb - even_kb) / num_odd
            squares += difference_kb.square().sum().item() / NUM_VECTORS
        total += torch.linalg.vector_norm(block, dtype=torch.float64).item() ** 2
    if not num_even or not num_odd or not total:
        return None
    difference = math.sqrt(squares / total * num_even * num_odd)
    return difference if math.isfinite(difference) else None
