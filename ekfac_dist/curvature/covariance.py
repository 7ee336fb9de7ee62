"""Running sums Σ x xᵀ, by their lower triangle.

A covariance is symmetric, so only block rows on and below the diagonal are multiplied: with k
blocks that is (k + 1) / 2k of the full product's operations. The upper triangle of a running sum is
meaningless until `mirror_` fills it, once, at the end.
"""

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from ekfac_dist.curvature import long_sums
from ekfac_dist.curvature.costs import block_rows


def add_outer_products_(sum_nn: Tensor, rows_Mi: Tensor, *, bias: bool) -> None:
    """Adds Σ_m x_m x_mᵀ to the lower triangle of a running sum, in place.

    Args:
        sum_nn: Running sum [n, n], float32 or float64; n = i, or i + 1 with a bias.
        rows_Mi: Rows [M, i]; converted to the sum's dtype, or multiplied as if they were.
        bias: Whether x is the row with a 1 appended. The 1 is never built: its products are the
            rows' sum and their number.
    """
    num_rows, size = rows_Mi.shape
    wide = rows_Mi.dtype != sum_nn.dtype == torch.float32
    wide = wide and multiplies_wide(rows_Mi.device, rows_Mi.dtype)
    if not wide:
        rows_Mi = rows_Mi.to(sum_nn.dtype)
    step = block_rows(size)
    for start in range(0, size, step):
        end = min(start + step, size)
        left, right, block = rows_Mi[:, start:end].T, rows_Mi[:, :end], sum_nn[start:end, :end]
        if wide:
            block.add_(torch.mm(left, right, out_dtype=torch.float32))
        else:
            block.addmm_(left, right)
    if bias:
        sum_nn[size, :size] += rows_Mi.sum(0, dtype=sum_nn.dtype)
        sum_nn[size, size] += num_rows


def outer_product_positions_per_term(sizes: Iterable[int], device: torch.device) -> int:
    """How many rows `add_outer_products_` adds to an element of any of some sums as one term.

    Args:
        sizes: Columns of the rows of each sum.
        device: Where the sums are.
    """
    narrowest = min(
        ((size - 1) % block_rows(size) + 1 for size in sizes if size),  # rows of the last block row
        default=1,
    )
    return long_sums.positions_per_term(narrowest, device)


@cache
def multiplies_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device gives products of 16-bit matrices in float32, with nothing rounded before.

    A product of two 16-bit numbers is exact in float32, so this is the same sum as that of the
    converted rows, at the speed of the 16-bit product. It is tried, once.
    """
    one = 1 + torch.finfo(dtype).eps  # its square is not a number of this dtype
    try:
        rows = torch.full((16, 16), one, device=device, dtype=dtype)
        product = torch.mm(rows.T, rows, out_dtype=torch.float32)
    except (RuntimeError, TypeError):  # no such kernel, or no such option
        return False
    return bool((product == 16 * one**2).all())


def mirror_(sum_nn: Tensor) -> Tensor:
    """Copies the lower triangle of a square matrix onto the upper one, in place, and returns it."""
    step = 1024
    size = sum_nn.shape[0]
    for start in range(0, size, step):
        end = min(start + step, size)
        sum_nn[:start, start:end] = sum_nn[start:end, :start].T
        diagonal = sum_nn[start:end, start:end]
        diagonal.copy_(torch.tril(diagonal) + torch.tril(diagonal, -1).T)
    return sum_nn
