"""Block-diagonal factors: n coordinates as B blocks on the diagonal (Grosse et al. 2023, app. A).

    n = 10, B = 3      0 1 2 3 | 4 5 6 | 7 8 9

What is between blocks is neither summed nor kept, so a factor takes 1/B of the memory and its
decomposition 1/B² of the time. The bias coordinate is the last, and so in the last block.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Blocks = Sequence[Tensor]


def block_sizes(size: int, number: int) -> list[int]:
    """Sizes of the blocks of a factor: about equal, the larger ones first; none is empty.

    Args:
        size: n.
        number: B; a factor that is smaller has a block for each coordinate.
    """
    number = min(number, size)
    return [size // number + (k < size % number) for k in range(number)]


def bounds(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where each block begins and ends."""
    start = 0
    for size in sizes:
        yield start, start + size
        start += size


def num_elements(size: int, number: int) -> int:
    """Numbers in all blocks of a factor."""
    return sum(n**2 for n in block_sizes(size, number))


def rotate_rows(
    rows_Mi: Tensor, basis: Blocks, *, bias: bool = False, last: Tensor | None = None
) -> Tensor:
    """Rows in the eigenbasis: x Q.

    Args:
        rows_Mi: Rows [..., M, i], in the eigenvectors' dtype; [M, i] where n = i + 1.
        basis: The blocks of Q, n in all, eigenvectors in columns; n = i, or i + 1 where the bias
            coordinate is left out of the rows.
        bias: Whether x is the row with a 1 appended (which is never built).
        last: The bias coordinate of each row [M, 1], if it is no 1.

    Returns:
        [..., M, n].
    """
    num_columns, parts = rows_Mi.shape[-1], []
    for block, (start, end) in zip(basis, bounds([len(block) for block in basis]), strict=True):
        rows = rows_Mi[..., start : min(end, num_columns)]
        if end <= num_columns:
            parts.append(rows @ block)
        elif last is not None:
            parts.append((rows @ block[:-1]).addr_(last[:, 0], block[-1]))
        else:
            assert bias
            parts.append(torch.addmm(block[-1], rows, block[:-1]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def rotate_columns(matrix_OX: Tensor, basis: Blocks) -> Tensor:
    """Qᵀ V for a matrix V [..., O, X], block by block."""
    return _from_left([block.T for block in basis], matrix_OX)


def rotate_columns_back(matrix_OX: Tensor, basis: Blocks) -> Tensor:
    """Q V for a matrix V [..., O, X], block by block."""
    return _from_left(basis, matrix_OX)


def rotate_rows_back(rows_Mn: Tensor, basis: Blocks) -> Tensor:
    """Rows out of the eigenbasis: x Qᵀ for x [..., M, n], block by block."""
    return rotate_rows(rows_Mn, [block.T for block in basis])


def _from_left(blocks: Blocks, matrix_OX: Tensor) -> Tensor:
    places = bounds([len(block) for block in blocks])
    parts = [
        block @ matrix_OX[..., start:end, :]
        for block, (start, end) in zip(blocks, places, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def on(basis: Blocks, *where: Any) -> list[Tensor]:
    """The blocks where `Tensor.to` would have each; copies only what is not there already."""
    return [block.to(*where) for block in basis]


def dense(basis: Blocks) -> Tensor:
    """The blocks as one matrix [n, n], zero between them."""
    return basis[0] if len(basis) == 1 else torch.block_diag(*basis)
