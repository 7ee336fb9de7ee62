"""Running sums Σ x xᵀ, of which only the lower triangle is computed.

A covariance is symmetric, so each block row is multiplied only up to its diagonal block: with k
block rows that takes (k + 1) / 2k of the full product's operations. The upper triangle of a running
sum is meaningless until `mirror_` fills it, once, at the end.

    k = 3      ■ · ·      ■ computed
               ■ ■ ·      · copied by `mirror_`
               ■ ■ ■
"""

from collections.abc import Iterable
from contextlib import ExitStack
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from ekfac_dist.curvature import long_sums
from ekfac_dist.curvature.costs import block_rows
from ekfac_dist.curvature.float32_products import ROUNDED_ROWS, rounded_to_bfloat16, rounds_on


def add_outer_products_(sum_nn: Tensor, vectors_Mi: Tensor, *, bias: bool) -> None:
    """Adds Σ_m x_m x_mᵀ to the lower triangle of a running sum, in place.

    Args:
        sum_nn: Running sum [n, n], float32 or float64; n = i, or i + 1 with a bias.
        vectors_Mi: The vectors at each position [M, i], of any float dtype; their products are
            computed in the sum's dtype.
        bias: Whether x is the vector with a 1 appended. The longer vectors are never built: the
            products with the 1 are the vectors' sum, and M.
    """
    num_positions, size = vectors_Mi.shape
    device, dtype = vectors_Mi.device, vectors_Mi.dtype
    is_exact = dtype != sum_nn.dtype == torch.float32  # a product of two 16-bit values, in float32
    wide = is_exact and multiplies_wide(device, dtype)
    with ExitStack() as stack:
        if is_exact and not wide and dtype == torch.bfloat16 and rounds_on(device):
            stack.enter_context(rounded_to_bfloat16())
            # Rows of zeros add nothing, and keep the products' shapes few.
            vectors_Mi = pad(vectors_Mi, (0, 0, 0, -num_positions % ROUNDED_ROWS))
        if not wide:
            vectors_Mi = vectors_Mi.to(sum_nn.dtype)
        step = block_rows(size, device)
        for start in range(0, size, step):
            end = min(start + step, size)
            left, right = vectors_Mi[:, start:end].T, vectors_Mi[:, :end]
            block = sum_nn[start:end, :end]
            if wide:
                block.add_(torch.mm(left, right, out_dtype=torch.float32))
            else:
                block.addmm_(left, right)
    if bias:
        sum_nn[size, :size] += vectors_Mi.sum(0, dtype=sum_nn.dtype)
        sum_nn[size, size] += num_positions


def outer_product_positions_per_term(sizes: Iterable[int], device: torch.device) -> int:
    """How many positions `add_outer_products_` adds to an element of a sum as one term.

    Args:
        sizes: i of each sum; the smallest number of positions of any of them counts.
        device: Where the sums are.
    """
    last_rows = ((size - 1) % block_rows(size, device) + 1 for size in sizes if size)
    narrowest = min(last_rows, default=1)
    return long_sums.positions_per_term(narrowest, device)


@cache
def multiplies_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device multiplies 16-bit matrices into float32 without rounding in between.

    The product of two 16-bit values is exact in float32, so such a product equals that of the
    matrices converted to float32, at the speed of the 16-bit one. Found out by one small product
    for each device and dtype.
    """
    value = 1 + torch.finfo(dtype).eps  # its square is not representable in this dtype
    try:
        matrix = torch.full((16, 16), value, device=device, dtype=dtype)
        product = torch.mm(matrix.T, matrix, out_dtype=torch.float32)
    except (RuntimeError, TypeError):  # no such kernel, or no such option
        return False
    return bool((product == 16 * value**2).all())


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
