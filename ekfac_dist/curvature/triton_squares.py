"""Sums of squares of sequences' gradients by one Triton kernel, on GPUs.

    Λ += Σ_n (Σ_{t in n} g_t a_tᵀ)∘²

Without it each sequence's product [O, I] is written to memory, read, squared, and added to Λ, which
is read and written too: at 128 positions a sequence that takes as long as the product. Here a
program owns a tile of Λ and forms that tile of one gradient after the other in registers:

    for each sequence n                 gradient = 0
      for every STEP positions t of it    gradient += gᵀ a
                                        total += gradient²
    Λ's tile += total

Matrix units truncate their sums instead of rounding them (Fasi et al. 2021, Numerical behavior of
NVIDIA tensor cores), and errors of one direction add up: by emulation, sums over 1,500 positions
are 2e-5 too small. So they sum STEP positions alone, which are added to the gradient by rounding to
nearest. Whether the units are used at all, with three TF32 products for one of float32, or
float32's own, is found out by trying: the error beside float64 decides, never the time, so all
workers with one kind of GPU choose alike, and so does a run that goes on later.

This module needs Triton, which torch's builds for CUDA bring. It was tested in Triton's
interpreter, and compiled for A100, H100 and B200, where no register spills; on a GPU it has not run
yet.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from ekfac_dist.curvature.float32_products import MOST_OVER_FLOAT32, precisely

# Rows and columns of a tile, and positions that are summed by matrix units.
TILE_O, TILE_I, STEP = 128, 64, 32
_WARPS = 8
# Precisions of Triton's products of float32, the faster one first.
PRECISIONS = ("tf32x3", "ieee")
# What it is tried with: O and I that are no multiples of a tile, and lengths that are none of STEP.
_TRIED_O, _TRIED_I, _TRIED_LENGTHS = 200, 150, (512, 1, 0, 37, 1500, 64)


@triton.jit(do_not_specialize=["num_sequences"])  # it is another in every batch
def _add_squares(  # type: ignore[no-untyped-def]  # Triton reads annotations
    lambdas,
    acts,
    grads,
    bounds,
    num_sequences,
    num_outputs,
    num_inputs,
    lambda_stride,
    acts_stride,
    grads_stride,
    one,
    TILE_O: tl.constexpr,
    TILE_I: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_across = tl.cdiv(num_inputs, TILE_I)
    rows = (tl.program_id(0) // tiles_across) * TILE_O + tl.arange(0, TILE_O)
    columns = (tl.program_id(0) % tiles_across) * TILE_I + tl.arange(0, TILE_I)
    are_rows, are_columns = rows < num_outputs, columns < num_inputs
    total = tl.zeros((TILE_O, TILE_I), tl.float32)
    for number in range(num_sequences):
        start, stop = tl.load(bounds + 2 * number), tl.load(bounds + 2 * number + 1)
        gradient = tl.zeros((TILE_O, TILE_I), tl.float32)
        for position in range(start, stop, STEP):
            positions = position + tl.arange(0, STEP)  # int64, as the bounds are
            are_own = positions < stop
            some_grads = tl.load(
                grads + positions[None, :] * grads_stride + rows[:, None],
                mask=are_own[None, :] & are_rows[:, None],
                other=0.0,
            )
            some_acts = tl.load(
                acts + positions[:, None] * acts_stride + columns[None, :],
                mask=are_own[:, None] & are_columns[None, :],
                other=0.0,
            )
            # Without the factor Triton would let the units add to the gradient themselves.
            gradient += one * tl.dot(some_grads, some_acts, input_precision=PRECISION)
        total += gradient * gradient
    places = lambdas + rows[:, None].to(tl.int64) * lambda_stride + columns[None, :]
    are_inside = are_rows[:, None] & are_columns[None, :]
    tl.store(places, tl.load(places, mask=are_inside, other=0.0) + total, mask=are_inside)


@dataclass(frozen=True)
class SquaresKernel:
    """The kernel with one of Triton's precisions.

    Attributes:
        precision: One of `PRECISIONS`.
    """

    precision: str

    @property
    def description(self) -> str:
        """The kernel in words."""
        return f"by one kernel, in Triton's {self.precision} precision"

    def add_(
        self,
        lambda_OI: Tensor,
        acts_MI: Tensor,
        grads_MO: Tensor,
        bounds: Sequence[tuple[int, int]],
    ) -> None:
        """Adds Σ_n G_n∘² to a running sum, in place.

        Args:
            lambda_OI: Running sum, float32, rows contiguous.
            acts_MI: Inputs at each position, float32.
            grads_MO: Output gradients at each position, float32.
            bounds: Of each sequence, its first position and the one after its last.
        """
        if not bounds:
            return
        assert lambda_OI.stride(1) == 1
        acts_MI, grads_MO = acts_MI.contiguous(), grads_MO.contiguous()
        (num_outputs, num_inputs), device = lambda_OI.shape, lambda_OI.device
        places = torch.tensor(bounds, dtype=torch.int64, pin_memory=device.type == "cuda")
        grid = (triton.cdiv(num_outputs, TILE_O) * triton.cdiv(num_inputs, TILE_I),)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            _add_squares[grid](
                lambda_OI,
                acts_MI,
                grads_MO,
                places.to(device, non_blocking=True),
                len(bounds),
                num_outputs,
                num_inputs,
                lambda_OI.stride(0),
                acts_MI.stride(0),
                grads_MO.stride(0),
                1.0,
                TILE_O=TILE_O,
                TILE_I=TILE_I,
                STEP=STEP,
                PRECISION=self.precision,
                num_warps=_WARPS,
            )


@cache
def tried(device: torch.device) -> SquaresKernel | str:
    """The kernel in the fastest precision that is accurate on a device; or why there is none.

    Triton compiles for each kind of GPU, with a C compiler that it has to find; what it raises
    where it cannot is its own. So whatever goes wrong here only means that there is no kernel.
    """
    try:
        errors, most = {}, MOST_OVER_FLOAT32 * _error(device, None)
        for precision in PRECISIONS:
            errors[precision] = _error(device, SquaresKernel(precision))
            if errors[precision] <= most:
                return SquaresKernel(precision)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return "its relative error is " + ", ".join(f"{e:.1e} in {p}" for p, e in errors.items())


def _error(device: torch.device, kernel: SquaresKernel | None) -> float:
    """Relative error of sums of squares by the kernel, or by torch's products in float32."""
    generator = torch.Generator().manual_seed(0)
    bounds = list(pairwise(accumulate(_TRIED_LENGTHS, initial=0)))
    acts_MI, grads_MO = (
        torch.randn(bounds[-1][1], size, generator=generator).to(device)
        for size in (_TRIED_I, _TRIED_O)
    )
    sums_OI = torch.zeros(_TRIED_O, _TRIED_I, device=device)
    exact_OI = sums_OI.double()
    with precisely(device):
        for start, stop in bounds:
            acts, grads = acts_MI[start:stop], grads_MO[start:stop]
            exact_OI += (grads.double().T @ acts.double()).square()
            if kernel is None:
                sums_OI += (grads.T @ acts).square()
    if kernel is not None:
        kernel.add_(sums_OI, acts_MI, grads_MO, bounds)
    return float((sums_OI - exact_OI).norm() / exact_OI.norm())
