"""Block-diagonal factors: n coordinates cut into B diagonal blocks (Grosse et al. 2023, app. A).

    n = 10, B = 3      0 1 2 3 | 4 5 6 | 7 8 9

Covariances between coordinates of different blocks are neither summed nor stored, so a factor takes
1/B of the memory and its decomposition 1/B² of the time. The bias coordinate is the last one, so it
lies in the last block.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ekfac_dist.curvature.split_matrices import RowBasis, SplitMatrix

# A block-diagonal matrix [n, n] as its square diagonal blocks, first to last.
Blocks = Sequence[Tensor]


def block_sizes(size: int, num_blocks: int) -> list[int]:
    """Sizes of a factor's blocks. They differ by at most 1, larger ones first; none is empty.

    Args:
        size: n, the size of the factor.
        num_blocks: B; where n < B there are n blocks of size 1.
    """
    num_blocks = min(num_blocks, size)
    return [size // num_blocks + (k < size % num_blocks) for k in range(num_blocks)]


def bounds(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First coordinate of each block and the coordinate after its last."""
    start = 0
    for size in sizes:
        yield start, start + size
        start += size


def num_elements(size: int, num_blocks: int) -> int:
    """Number of elements of all blocks of a factor together; arguments as for `block_sizes`."""
    return sum(n**2 for n in block_sizes(size, num_blocks))


def rotate_rows(
    rows_Mi: Tensor, basis: RowBasis, *, bias: bool = False, last: Tensor | None = None
) -> Tensor:
    """X Q: each row of a matrix expressed in the eigenbasis.

    Args:
        rows_Mi: X without its bias coordinate [..., M, i], in the eigenvectors' dtype; where these
            are split, in any. Where n = i + 1, or they are split, it must have two dimensions.
        basis: The blocks of Q, of size n together, eigenvectors in columns; n is i, or i + 1 where
            the bias coordinate is left out of `rows_Mi`.
        bias: Whether a 1 is appended to each row. The longer rows are never built.
        last: The bias coordinate of each row [M, 1], if it is something other than 1; of blocks
            that are not split.

    Returns:
        [..., M, n].
    """
    num_columns, parts = rows_Mi.shape[-1], []
    for block, (start, end) in zip(basis, bounds([len(block) for block in basis]), strict=True):
        rows = rows_Mi[..., start : min(end, num_columns)]
        if isinstance(block, SplitMatrix):
            assert last is None
            assert bias or end <= num_columns
            parts.append(block.rows_times(rows, bias=end > num_columns))
        elif end <= num_columns:
            parts.append(rows @ block)
        elif last is not None:
            parts.append((rows @ block[:-1]).addr_(last[:, 0], block[-1]))
        else:
            assert bias
            parts.append(torch.addmm(block[-1], rows, block[:-1]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def rotate_columns(matrix_OX: Tensor, basis: Blocks) -> Tensor:
    """Qᵀ V for a matrix V [..., O, X], block by block."""
    return _multiply_from_left([block.T for block in basis], matrix_OX)


def rotate_columns_back(matrix_OX: Tensor, basis: Blocks) -> Tensor:
    """Q V for a matrix V [..., O, X], block by block."""
    return _multiply_from_left(basis, matrix_OX)


def rotate_rows_back(rows_Mn: Tensor, basis: Blocks) -> Tensor:
    """X Qᵀ for a matrix X [..., M, n], block by block: undoes `rotate_rows`."""
    return rotate_rows(rows_Mn, [block.T for block in basis])


def _multiply_from_left(blocks: Blocks, matrix_OX: Tensor) -> Tensor:
    places = bounds([len(block) for block in blocks])
    parts = [
        block @ matrix_OX[..., start:end, :]
        for block, (start, end) in zip(blocks, places, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def on(basis: Blocks, *target: Any) -> list[Tensor]:
    """The blocks on a device or in a dtype, by `Tensor.to(*target)`; copied only if necessary."""
    return [block.to(*target) for block in basis]


def dense(basis: Blocks) -> Tensor:
    """The block-diagonal matrix [n, n], with zeros outside the blocks."""
    return basis[0] if len(basis) == 1 else torch.block_diag(*basis)
