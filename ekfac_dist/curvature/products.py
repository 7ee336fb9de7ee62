"""Inner products of training sequences' gradients with preconditioned query gradients.

For one module a sequence's gradient is G_n = Σ_t g_t a_tᵀ [O, I], and its score for query q is
⟨P_q, G_n⟩ = Σ_t g_tᵀ P_q a_t. In multiply-add pairs, for a sequence of T positions and Q queries:

    by sequence     form G_n once, then Q products of matrices          (T + Q)·O·I
    by position     the bilinear form at each position                  T·Q·O·I
    low rank        P_q = U_q V_qᵀ of rank r, at each position          T·Q·r·(O + I)
    multiplied out  P_q from U_q and V_q once a batch, by sequence      (T + Q)·O·I, and Q·r·O·I

So scores of whole sequences are computed by sequence unless the rank is low and the queries are
few; scores of positions have no such choice. Everything here is in whichever basis the arguments
share: the parameters' own, or the eigenbasis.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Memory of the gradients that are held at a time.
GRADIENT_BYTES = 2**28

# Of the subspace iteration: dimensions beyond the rank, and products with the matrix and back.
_OVERSAMPLING = 8
_ITERATIONS = 2


def with_bias(rows_Mi: Tensor) -> Tensor:
    """Input rows with the bias coordinate, a 1, appended: [M, i + 1]."""
    return torch.nn.functional.pad(rows_Mi, (0, 1), value=1.0)


class ScratchBuffer:
    """Memory that is used again: fresh memory costs as much as a fifth of what fills it."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def of(self, like: Tensor, *size: int) -> Tensor:
        """A tensor of some size, whose content is whatever was there."""
        number = math.prod(size)
        if self._buffer is None or self._buffer.numel() < number:
            self._buffer = like.new_empty(number)
        return self._buffer[:number].view(size)


class SequenceGradients:
    """Makes the gradients of sequences, a few at a time, in memory that is used again."""

    def __init__(self) -> None:
        self._scratch = ScratchBuffer()

    def of(
        self, acts_MI: Tensor, grads_MO: Tensor, lengths: Sequence[int]
    ) -> Iterator[tuple[slice, Tensor]]:
        """G_n = Σ_t g_t a_tᵀ of every sequence.

        Args:
            acts_MI: Input rows, sequence after sequence.
            grads_MO: Output-gradient rows, likewise.
            lengths: Rows of each sequence; they sum to M.

        Yields:
            (which sequences, their gradients [n, O, I]); the next ones overwrite them.
        """
        num_inputs, num_outputs = acts_MI.shape[1], grads_MO.shape[1]
        step = max(1, GRADIENT_BYTES // (num_inputs * num_outputs * acts_MI.element_size()))
        start = 0
        for first in range(0, len(lengths), step):
            part = lengths[first : first + step]
            rows = slice(start, start + sum(part))
            acts_nTI = _by_sequence(acts_MI[rows], part)
            grads_nTO = _by_sequence(grads_MO[rows], part)
            gradients_nOI = self._scratch.of(acts_MI, len(part), num_outputs, num_inputs)
            torch.bmm(grads_nTO.transpose(1, 2), acts_nTI, out=gradients_nOI)
            yield slice(first, first + len(part)), gradients_nOI
            start = rows.stop


def query_matrices(
    left_QOr: Tensor, right_QIr: Tensor, scratch: ScratchBuffer
) -> Iterator[tuple[slice, Tensor]]:
    """U Vᵀ of every query, a few at a time.

    Args:
        left_QOr: U of each query.
        right_QIr: V of each query.
        scratch: Where they are put.

    Yields:
        (which queries, their matrices [q, O, I]); the next ones overwrite them.
    """
    num_queries, num_outputs, _ = left_QOr.shape
    num_inputs = right_QIr.shape[1]
    step = max(1, GRADIENT_BYTES // (num_inputs * num_outputs * left_QOr.element_size()))
    for first in range(0, num_queries, step):
        some = slice(first, min(first + step, num_queries))
        matrices_qOI = scratch.of(left_QOr, some.stop - first, num_outputs, num_inputs)
        torch.bmm(left_QOr[some], right_QIr[some].transpose(1, 2), out=matrices_qOI)
        yield some, matrices_qOI


def low_rank_by_position(left_QOr: Tensor, right_QIr: Tensor, lengths: Sequence[int]) -> bool:
    """Whether scores of sequences cost less at each position than by multiplying out.

    Args:
        left_QOr: U of each query.
        right_QIr: V of each query.
        lengths: Positions of each sequence of the batch.
    """
    num_queries, num_outputs, rank = left_QOr.shape
    num_inputs, positions = right_QIr.shape[1], sum(lengths)
    by_position = positions * num_queries * rank * (num_outputs + num_inputs)
    products = positions + num_queries * (len(lengths) + rank)
    return by_position <= products * num_outputs * num_inputs


def position_scores(query_OI: Tensor, acts_MI: Tensor, grads_MO: Tensor) -> Tensor:
    """g_tᵀ P a_t at every position: [M]."""
    return ((acts_MI @ query_OI.T) * grads_MO).sum(-1)


def low_rank_position_scores(
    left_QOr: Tensor, right_QIr: Tensor, acts_MI: Tensor, grads_MO: Tensor
) -> Tensor:
    """g_tᵀ U Vᵀ a_t for every query, at every position: [Q, M]."""
    num_queries, _, rank = left_QOr.shape
    room = grads_MO.element_size() * rank * max(1, len(grads_MO))
    step = max(1, GRADIENT_BYTES // room)
    found = []
    for first in range(0, num_queries, step):
        some = slice(first, first + step)
        left = grads_MO @ left_QOr[some].transpose(0, 1).flatten(1)
        right = acts_MI @ right_QIr[some].transpose(0, 1).flatten(1)
        found.append(left.mul_(right).view(len(grads_MO), -1, rank).sum(-1).T)
    return torch.cat(found)


def sum_by_sequence(scores_QM: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sums of positions' scores over each sequence: [Q, n]."""
    return torch.stack([part.sum(-1) for part in scores_QM.split(list(lengths), -1)], -1)


def low_rank(matrix_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U [O, r] and V [I, r] such that U Vᵀ is nearly the best approximation of that rank.

    Subspace iteration from a random start (Halko et al. 2011, algorithm 4.4), the start being the
    same each time; exact where the rank is the matrix's own.

    Args:
        matrix_OI: The matrix.
        rank: r, at most min(O, I).
    """
    num_rows, num_columns = matrix_OI.shape
    if rank > min(matrix_OI.shape):
        raise ValueError(f"rank {rank} is above that of a matrix of shape {[*matrix_OI.shape]}")
    if 4 * rank >= min(matrix_OI.shape):
        left, values, right = torch.linalg.svd(matrix_OI, full_matrices=False)
        return left[:, :rank] * values[:rank], right[:rank].T
    if num_rows < num_columns:
        right, left = low_rank(matrix_OI.T, rank)
        return left, right
    generator = torch.Generator().manual_seed(num_rows * num_columns + rank)
    start = torch.randn(num_columns, rank + _OVERSAMPLING, generator=generator)
    basis = _orthogonal(matrix_OI @ start.to(matrix_OI))
    for _ in range(_ITERATIONS):
        basis = _orthogonal(matrix_OI @ _orthogonal(matrix_OI.T @ basis))
    left, values, right = torch.linalg.svd(basis.T @ matrix_OI, full_matrices=False)
    return basis @ (left[:, :rank] * values[:rank]), right[:rank].T


def _orthogonal(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix).Q


def _by_sequence(rows_MX: Tensor, lengths: Sequence[int]) -> Tensor:
    """Rows as [n, T, X], with rows of zeros after the end of a shorter sequence."""
    longest = max(lengths)
    if min(lengths) == longest:
        return rows_MX.view(len(lengths), longest, -1)
    return torch.nn.utils.rnn.pad_sequence(list(rows_MX.split(list(lengths))), batch_first=True)
