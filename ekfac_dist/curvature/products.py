"""Inner products of training sequences' gradients with preconditioned query gradients.

For one module a sequence's gradient is G_n = Σ_t g_t a_tᵀ [O, I], and its score for query q is
⟨P_q, G_n⟩ = Σ_t g_tᵀ P_q a_t. In multiply-add pairs, for a sequence of T positions and Q queries:

    by sequence     form G_n once, then take Q inner products             (T + Q)·O·I
    by position     take the bilinear form at each position               T·Q·O·I
    low rank        the same with P_q = U_q V_qᵀ of rank r                T·Q·r·(O + I)
    rebuilt         form P_q from U_q and V_q once a batch, by sequence   (T + Q)·O·I, and Q·r·O·I

By position all is one large product of all sequences' positions, at the processor's full rate. By
sequence gradients are formed a tile at a time, some rows of some sequences' gradients, which is
multiplied with the same rows of the query gradients and forgotten while it is in the caches:

    G_1 ┌────────┐   G_2 ┌────────┐         P_1 ┌────────┐   P_2 ┌────────┐
        │        │       │        │             │        │       │        │
        │▒▒▒▒▒▒▒▒│       │▒▒▒▒▒▒▒▒│      ·      │▒▒▒▒▒▒▒▒│       │▒▒▒▒▒▒▒▒│
        └────────┘       └────────┘             └────────┘       └────────┘

What an element of a tile costs beside its multiply-adds is in `costs`. So one query's scores, and
those of few queries and very short sequences, are computed by position; else they are by sequence,
unless the rank is low and the queries are few. Scores of single positions allow no such choice. All
arguments of a function must be in the same basis, the parameters' own or the eigenbasis.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ekfac_dist.curvature.costs import from_gradients, tile_bytes, tile_size

# Subspace iteration in `low_rank`: dimensions beyond the rank, and number of iterations.
_OVERSAMPLING, _ITERATIONS = 8, 2
# And where it is wanted quickly: 2.1 ms for 4.8 (1536 × 576, rank 12, one core of an AMD EPYC).
_QUICK_OVERSAMPLING, _QUICK_ITERATIONS = 4, 1


def with_bias(acts_Mi: Tensor) -> Tensor:
    """Inputs with the bias coordinate, a 1, appended: [M, i + 1]."""
    return torch.nn.functional.pad(acts_Mi, (0, 1), value=1.0)


class ScratchBuffer:
    """One allocation that is reused for temporary tensors, and grows to the largest of them.

    Allocating anew takes up to a fifth as long as the computation that fills the memory.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def of(self, like: Tensor, *size: int) -> Tensor:
        """An uninitialised tensor in the buffer, which overwrites the tensor returned before.

        Args:
            like: A tensor with the dtype and on the device wanted; the same in every call.
            *size: The tensor's shape.
        """
        num_elements = math.prod(size)
        if self._buffer is None or self._buffer.numel() < num_elements:
            self._buffer = like.new_empty(num_elements)
        return self._buffer[:num_elements].view(size)


class GradientTiles:
    """Forms the gradients of sequences, some rows of a few at a time, in a scratch buffer."""

    def __init__(self) -> None:
        self._scratch = ScratchBuffer()

    def of(
        self, acts_MI: Tensor, grads_MO: Tensor, lengths: Sequence[int]
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """G_n = Σ_t g_t a_tᵀ of every sequence.

        Args:
            acts_MI: Inputs at each position, sequence after sequence, with the bias coordinate.
            grads_MO: Output gradients at each position, in the same order.
            lengths: Positions of each sequence; they sum to M.

        Yields:
            (slice of the sequences, slice of the rows, these rows of these sequences' gradients
            [n, o, I]). Each tensor is overwritten when the next one is asked for.
        """
        num_inputs, num_outputs = acts_MI.shape[1], grads_MO.shape[1]
        row_bytes, most_bytes = num_inputs * acts_MI.element_size(), tile_bytes(acts_MI.device)
        step, num_rows = tile_size(len(lengths), row_bytes, num_outputs, most_bytes)
        start = 0
        for first in range(0, len(lengths), step):
            few_lengths = lengths[first : first + step]
            positions = slice(start, start + sum(few_lengths))
            start = positions.stop
            acts_nTI = padded_by_sequence(acts_MI[positions], few_lengths)
            grads_nOT = padded_by_sequence(grads_MO[positions], few_lengths).transpose(1, 2)
            for rows in _slices(num_outputs, num_rows):
                tile_noI = self._scratch.of(
                    acts_MI, len(few_lengths), rows.stop - rows.start, num_inputs
                )
                torch.bmm(grads_nOT[:, rows], acts_nTI, out=tile_noI)
                yield slice(first, first + len(few_lengths)), rows, tile_noI


def query_rows(
    left_QOr: Tensor, right_QIr: Tensor, rows: slice, scratch: ScratchBuffer
) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of every query's P = U Vᵀ, of a few queries at a time, in a scratch buffer.

    Args:
        left_QOr: U of each query.
        right_QIr: V of each query.
        rows: Which rows.
        scratch: Buffer that holds them.

    Yields:
        (slice of the queries, these rows of their matrices [q, o, I]). Each tensor is overwritten
        when the next one is asked for.
    """
    left_Qor = left_QOr[:, rows]
    num_queries, num_rows, _ = left_Qor.shape
    num_inputs = right_QIr.shape[1]
    row_bytes = num_rows * num_inputs * left_QOr.element_size()
    step, _ = tile_size(num_queries, row_bytes, 1, tile_bytes(left_QOr.device))
    for queries in _slices(num_queries, step):
        rows_qoI = scratch.of(left_QOr, queries.stop - queries.start, num_rows, num_inputs)
        torch.bmm(left_Qor[queries], right_QIr[queries].transpose(1, 2), out=rows_qoI)
        yield queries, rows_qoI


def by_position(num_queries: int, lengths: Sequence[int], are_formed: bool) -> bool:
    """Whether sequence scores of whole queries cost no more by position than by sequence.

    Args:
        num_queries: Q.
        lengths: Positions of each sequence of the batch.
        are_formed: Whether the sequences' gradients are formed anyway.
    """
    num_positions = sum(lengths)
    by_sequence = from_gradients(num_positions, len(lengths), num_queries, are_formed)
    return num_positions * num_queries <= by_sequence


def low_rank_by_position(
    left_QOr: Tensor, right_QIr: Tensor, lengths: Sequence[int], are_formed: bool
) -> bool:
    """Whether sequence scores of low-rank queries cost no more by position than rebuilt.

    See the module's table for the two costs.

    Args:
        left_QOr: U of each query.
        right_QIr: V of each query.
        lengths: Positions of each sequence of the batch.
        are_formed: Whether the sequences' gradients are formed anyway.
    """
    num_queries, num_outputs, rank = left_QOr.shape
    num_inputs, num_positions = right_QIr.shape[1], sum(lengths)
    of_vectors = num_positions * num_queries * rank * (num_outputs + num_inputs)
    by_sequence = from_gradients(num_positions, len(lengths), num_queries, are_formed)
    return of_vectors <= (by_sequence + num_queries * rank) * num_outputs * num_inputs


def position_scores(query_OI: Tensor, acts_MI: Tensor, grads_MO: Tensor) -> Tensor:
    """g_tᵀ P a_t for one query, at every position: [M]."""
    return (acts_MI @ query_OI.T).mul_(grads_MO).sum(-1)


def low_rank_position_scores(
    left_QOr: Tensor, right_QIr: Tensor, acts_MI: Tensor, grads_MO: Tensor
) -> Tensor:
    """g_tᵀ U Vᵀ a_t for every query, at every position: [Q, M], in float32 or a wider dtype.

    All arguments have one dtype, in which U and V are multiplied with g and a.
    """
    num_queries, _, rank = left_QOr.shape
    wide = torch.promote_types(left_QOr.dtype, torch.float32)
    query_bytes = wide.itemsize * rank * max(1, len(grads_MO))
    step, _ = tile_size(num_queries, query_bytes, 1, tile_bytes(grads_MO.device))
    parts = []
    for queries in _slices(num_queries, step):
        left = grads_MO @ left_QOr[queries].transpose(0, 1).flatten(1)
        right = acts_MI @ right_QIr[queries].transpose(0, 1).flatten(1)
        products = left.to(wide).mul_(right)
        parts.append(products.view(len(grads_MO), -1, rank).sum(-1).T)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def sum_by_sequence(scores_QM: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sums of position scores over each of n sequences: [Q, n].

    Args:
        scores_QM: Scores at each position, sequence after sequence.
        lengths: Positions of each sequence; they sum to M.
    """
    if len(set(lengths)) == 1:
        return scores_QM.unflatten(-1, (len(lengths), -1)).sum(-1)
    return torch.stack([scores.sum(-1) for scores in scores_QM.split(list(lengths), -1)], -1)


def low_rank(matrix_OI: Tensor, rank: int, *, quickly: bool = False) -> tuple[Tensor, Tensor]:
    """U [O, r] and V [I, r] such that U Vᵀ is nearly the best approximation of rank r.

    Subspace iteration from a random start (Halko et al. 2011, algorithm 4.4). The start is seeded
    by shape and rank, so results repeat. Exact where the matrix has rank r; from r = min(O, I) / 4
    on a full singular value decomposition is used instead.

    Args:
        matrix_OI: The matrix.
        rank: r, at most min(O, I).
        quickly: Whether less accuracy will do, for half of the time.

    Raises:
        ValueError: If `rank` is larger than min(O, I).
    """
    num_rows, num_columns = matrix_OI.shape
    if rank > min(matrix_OI.shape):
        raise ValueError(f"rank {rank} is above that of a matrix of shape {[*matrix_OI.shape]}")
    if 4 * rank >= min(matrix_OI.shape):
        left, values, right = torch.linalg.svd(matrix_OI, full_matrices=False)
        return left[:, :rank] * values[:rank], right[:rank].T
    if num_rows < num_columns:
        right, left = low_rank(matrix_OI.T, rank, quickly=quickly)
        return left, right
    oversampling = _QUICK_OVERSAMPLING if quickly else _OVERSAMPLING
    generator = torch.Generator().manual_seed(num_rows * num_columns + rank)
    start = torch.randn(num_columns, rank + oversampling, generator=generator)
    basis = _orthogonal(_times(matrix_OI, start.to(matrix_OI)))
    for _ in range(_QUICK_ITERATIONS if quickly else _ITERATIONS):
        basis = _orthogonal(_times(matrix_OI, _orthogonal(_times(matrix_OI.T, basis))))
    # The SVD of BᵀM = (Q R)ᵀ from that of R, which is no larger than the rank: on a GPU that of a
    # wide matrix is slow.
    wide, triangle = torch.linalg.qr(_times(matrix_OI.T, basis))
    left, values, right = torch.linalg.svd(triangle.T)
    return basis @ (left[:, :rank] * values[:rank]), wide @ right[:rank].T


def _times(matrix: Tensor, few_columns: Tensor) -> Tensor:
    """Their product, in the order in which MKL takes three quarters of the time."""
    return (few_columns.T @ matrix.T).T


def _orthogonal(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix).Q


def padded_by_sequence(vectors_MX: Tensor, lengths: Sequence[int]) -> Tensor:
    """The vectors of n sequences as [n, T, X], shorter sequences padded with zeros."""
    longest = max(lengths)
    if min(lengths) == longest:
        return vectors_MX.view(len(lengths), longest, -1)
    return torch.nn.utils.rnn.pad_sequence(list(vectors_MX.split(list(lengths))), batch_first=True)


def _slices(number: int, step: int) -> Iterator[slice]:
    """Slices of `step` at most that are all of a dimension, in order."""
    for first in range(0, number, step):
        yield slice(first, min(first + step, number))
