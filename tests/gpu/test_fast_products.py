"""Products that GPUs make faster: as exact as float32's, and how much faster they are.

Run with: bash launch/test.sh -m gpu. Of the times nothing is required.
"""

import time

import pytest
import torch
from helpers.dense import relative
from helpers.networks import build, examples

from ekfac_dist import estimate_factors
from ekfac_dist.curvature import refit, split_matrices
from ekfac_dist.curvature.float32_products import precisely
from ekfac_dist.curvature.refit import add_sequence_squares_, squares_kernel
from ekfac_dist.curvature.split_matrices import SplitMatrix

pytestmark = pytest.mark.gpu


def seconds(work):
    """The least time of five."""
    taken = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


@pytest.mark.parametrize(("rows", "size"), [(8192, 1024), (8192, 4096), (2048, 14336)])
def test_split_bases_rotate_as_exactly_as_float32_ones(machine, found, rows, size):
    machine.require_gpu()
    device = machine.device
    torch.manual_seed(0)
    acts = torch.randn(rows, size, device=device).bfloat16()
    basis = torch.linalg.qr(torch.randn(size, size, device=device))[0]
    split, wide = SplitMatrix.of(basis), acts.float()
    expected = acts[:256].double() @ basis.double()
    with precisely(device):
        plain, times = (wide @ basis)[:256], [seconds(lambda: wide @ basis)]
    times.append(seconds(lambda: split.rows_times(acts)))
    error = relative(split.rows_times(acts)[:256].double(), expected)
    plain_error = relative(plain.double(), expected)
    found(
        f"errors {error:.1e}, float32 {plain_error:.1e}; {times[0] / times[1]:.2f} times as fast; "
        f"split here: {split_matrices.splits(device, torch.bfloat16, torch.float32)}"
    )
    assert error < split_matrices.MOST_OVER_FLOAT32 * plain_error


@pytest.mark.parametrize("length", [16, 128, 512, 2048])
def test_the_kernel_sums_squares_as_exactly_as_float32_products(
    machine, found, monkeypatch, length
):
    machine.require_gpu()
    device = machine.device
    kernel = squares_kernel(device)
    assert not isinstance(kernel, str), kernel
    torch.manual_seed(0)
    lengths = [length] * (8192 // length)
    acts, grads = (torch.randn(8192, size, device=device) for size in (3072, 1000))
    expected = torch.zeros(1000, 3072, dtype=torch.float64, device=device)
    for a, g in zip(acts.double().split(lengths), grads.double().split(lengths), strict=True):
        expected += (g.T @ a).square()

    def add(total):
        with precisely(device):
            add_sequence_squares_(
                total, acts, grads, lengths, basis_II=None, basis_OO=None, bias=False
            )

    errors, times = [], []
    for chosen in (kernel, "none"):
        monkeypatch.setattr(refit, "squares_kernel", lambda device, chosen=chosen: chosen)
        total = torch.zeros(1000, 3072, device=device)
        add(total)
        errors.append(relative(total.double(), expected))
        times.append(seconds(lambda: add(torch.zeros(1000, 3072, device=device))))
    found(
        f"{kernel.precision}: errors {errors[0]:.1e}, without {errors[1]:.1e}; "
        f"{times[1] / times[0]:.2f} times as fast"
    )
    assert errors[0] < 8 * errors[1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_bfloat16_fit_has_the_factors_of_float32_products(machine, found, monkeypatch, family):
    machine.require_gpu()

    def fit(pays):
        monkeypatch.setattr(split_matrices, "_pays_on", lambda device: pays)
        if not pays:
            monkeypatch.setattr(refit, "squares_kernel", lambda device: "none")
        model = build(family).to(machine.device, torch.bfloat16)
        return estimate_factors(model, examples(24), labels="data", batch_tokens=400)

    fast, plain = fit(True), fit(False)
    worst = max(
        relative(fast.module(name).lambda_OI, plain.module(name).lambda_OI)
        for name in plain.modules
    )
    found(f"Λ differs by {worst:.1e}")
    assert worst < 1e-5
