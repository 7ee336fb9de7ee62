"""Float32 matrices as sums of three bfloat16 ones, for products with bfloat16 rows on GPUs.

A float32 number has 24 significant bits and a bfloat16 number 8, so Q = Q₁ + Q₂ + Q₃ is exact,
but for elements below 2⁻¹⁰⁹. Rows X of bfloat16 values have products with each part that are exact
in float32. So X Q is three 16-bit products with float32 sums, and as accurate as the float32
product if the sums are:

    Q₁   nearest to Q              X Q₁ in chunks of CHUNK columns of X, which are added by rounding
    Q₂   nearest to Q − Q₁         X Q₂ at once: it is 2⁻⁸ of the whole, and its error with it
    Q₃   nearest to Q − Q₁ − Q₂    X Q₃ at once

GPUs' matrix units truncate their sums instead of rounding them (Fasi et al. 2021, Numerical
behavior of NVIDIA tensor cores), and errors of one direction add up. By emulation on a CPU, at once
over 4,096 columns the product is 5e-6 off, in chunks 5e-7, and the float32 product 3e-7.

Where this pays is fixed by a GPU's capability: those for data centres make 16-bit products with
float32 sums 15 times as fast as float32's, others 2 to 4 times. The error beside float64 is
measured once for each device; nothing is timed. So all workers with one kind of GPU choose alike,
and so does a run that goes on later; but a fit splits only where memory is left (`fit.refit`).
It has not run on a GPU yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ekfac_dist.curvature.covariance import multiplies_wide
from ekfac_dist.curvature.float32_products import MOST_OVER_FLOAT32, precisely

# Columns of X that matrix units sum by themselves.
CHUNK = 512
# Bytes of an element of a split matrix.
SPLIT_BYTES = 3 * torch.bfloat16.itemsize
# Capabilities of A100, H100 and H200, B200 and B300: NVIDIA's data sheets, dense.
_PAYS = ((8, 0), (9, 0), (10, 0), (10, 3))
# Shape [M, i] × [i, n] with which the error is measured: the longest sums of common models.
_TRIED = (256, 14_336, 256)


@dataclass(frozen=True)
class SplitMatrix:
    """A float32 matrix [i, n] as the sum of three bfloat16 ones.

    Attributes:
        parts: The three, the largest first; `SPLIT_BYTES` for each element together.
    """

    parts: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def of(cls, matrix_in: Tensor) -> "SplitMatrix":
        """Splits a float32 matrix, which is not needed any more afterwards."""
        rest, parts = matrix_in, []
        for _ in range(3):
            parts.append(rest.bfloat16())
            rest = rest - parts[-1]
        return cls((parts[0], parts[1], parts[2]))

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def whole(self) -> Tensor:
        """The matrix itself, float32: a new tensor."""
        first, second, third = self.parts
        return third.float().add_(second).add_(first)

    def rows_times(self, rows_Mi: Tensor, *, bias: bool = False) -> Tensor:
        """X Q, float32.

        Args:
            rows_Mi: X, in bfloat16 for the fast products; any other dtype is multiplied in float32.
            bias: Whether a 1 is appended to each row of X.

        Returns:
            [M, n].
        """
        if rows_Mi.dtype != torch.bfloat16:
            whole = self.whole()
            rows_Mi = rows_Mi.float()
            return torch.addmm(whole[-1], rows_Mi, whole[:-1]) if bias else rows_Mi @ whole
        first, second, third = (part[:-1] if bias else part for part in self.parts)
        product = _wide(rows_Mi, third).add_(_wide(rows_Mi, second))
        for start in range(0, rows_Mi.shape[1], CHUNK):
            chunk = slice(start, start + CHUNK)
            product.add_(_wide(rows_Mi[:, chunk], first[chunk]))
        if bias:
            first, second, third = (part[-1] for part in self.parts)
            product.add_(SplitMatrix((first, second, third)).whole())
        return product


# A block-diagonal matrix by which rows are rotated, as its blocks: whole, or split.
RowBasis = Sequence[Tensor | SplitMatrix]


def whole(basis: RowBasis) -> list[Tensor]:
    """The blocks of a basis as float32 matrices; new ones where they are split."""
    return [block.whole() if isinstance(block, SplitMatrix) else block for block in basis]


def splits(device: torch.device, rows: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether products of rows with matrices are made with split ones.

    Args:
        device: Where they are computed.
        rows: Dtype in which the rows are exact: the model's.
        dtype: Dtype of the products.
    """
    return rows == torch.bfloat16 and dtype == torch.float32 and _pays_on(device)


@cache
def _pays_on(device: torch.device) -> bool:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) not in _PAYS:
        return False
    return multiplies_wide(device, torch.bfloat16) and is_accurate(device)


def is_accurate(device: torch.device) -> bool:
    """Whether a product with a split matrix is about as near to float64 as the float32 product."""
    num_rows, num_inputs, num_outputs = _TRIED
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(num_rows, num_inputs, generator=generator).bfloat16().to(device)
    matrix = torch.randn(num_inputs, num_outputs, generator=generator).to(device)
    exact = rows.double() @ matrix.double()
    with precisely(device):
        plain = rows.float() @ matrix
    split = SplitMatrix.of(matrix).rows_times(rows)
    return bool((split - exact).norm() <= MOST_OVER_FLOAT32 * (plain - exact).norm())


def _wide(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right, out_dtype=torch.float32)
