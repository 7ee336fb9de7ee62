"""The kernel that sums squares: in Triton's interpreter, beside dense float64 products; compiled.

Run with: TRITON_INTERPRET=1 bash launch/test.sh -m triton. The interpreter multiplies in float32,
whichever precision is asked for.
"""

import json
import os
import subprocess
import sys
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from helpers.dense import relative
from helpers.networks import build, examples

from ekfac_dist import estimate_factors
from ekfac_dist.curvature import refit

pytestmark = pytest.mark.triton
CPU = torch.device("cpu")
# Empty, of one position, of as many as matrix units sum at a time, and of more.
LENGTHS = (5, 0, 1, 32, 33, 70, 0)


@pytest.fixture
def triton_squares():
    """The kernel's module."""
    if os.environ.get("TRITON_INTERPRET") != "1":  # too late now: Triton may be imported already
        pytest.fail("set TRITON_INTERPRET=1, which has Triton's kernels interpreted on the CPU")
    from ekfac_dist.curvature import triton_squares

    triton_squares.tried.cache_clear()
    yield triton_squares
    triton_squares.tried.cache_clear()


@pytest.fixture
def kernel(triton_squares):
    return triton_squares.SquaresKernel("ieee")


def bounds_of(lengths):
    return list(pairwise(accumulate(lengths, initial=0)))


def rows(num_outputs, num_inputs, lengths=LENGTHS):
    torch.manual_seed(0)
    return torch.randn(sum(lengths), num_inputs), torch.randn(sum(lengths), num_outputs)


def squares(acts_MI, grads_MO, bounds):
    """Σ_n G_n∘² in float64."""
    acts_MI, grads_MO = acts_MI.double(), grads_MO.double()
    return sum((grads_MO[a:b].T @ acts_MI[a:b]).square() for a, b in bounds)


@pytest.mark.parametrize("shape", [(1, 1), (6, 8), (128, 64), (129, 65), (300, 150)])
@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (0,), (300,), (1, 1, 1)])
def test_the_kernel_sums_the_squares_of_dense_products(kernel, shape, lengths):
    (acts, grads), bounds = rows(*shape, lengths), bounds_of(lengths)
    total = torch.full(shape, 2.0)
    kernel.add_(total, acts, grads, bounds)
    expected = 2 + squares(acts, grads, bounds)
    # An element's error is at most that of its terms' sums: T units of rounding of Σ_t |g_t a_t|.
    absolute = squares(acts.abs(), grads.abs(), bounds) + 2
    assert ((total - expected).abs() <= (2 * max(lengths) + 8) * 2.0**-24 * absolute).all()
    assert relative(total.double(), expected) < 3e-7


def test_the_kernel_reads_and_writes_its_own_elements_alone(kernel):
    acts, grads = rows(130, 70)
    bounds = [bound for k, bound in enumerate(bounds_of(LENGTHS)) if k in (0, 3, 5)]
    expected = squares(acts, grads, bounds)
    others = torch.ones(len(acts), dtype=torch.bool)
    for start, stop in bounds:
        others[start:stop] = False
    acts[others], grads[others] = torch.nan, torch.inf
    around = torch.zeros(132, 75)
    kernel.add_(around[1:131, 2:72], acts, grads, bounds)
    assert relative(around[1:131, 2:72].double(), expected) < 3e-7
    around[1:131, 2:72] = 0
    assert not around.any()
    kernel.add_(around, acts, grads, [])
    assert not around.any()


def test_the_kernel_shows_what_is_not_finite(kernel):
    acts, grads = rows(6, 8)
    acts[3, 2] = torch.nan
    total = torch.zeros(6, 8)
    kernel.add_(total, acts, grads, bounds_of(LENGTHS))
    assert total[:, 2].isnan().all()
    assert total[:, 3:].isfinite().all()


def test_the_first_precision_that_is_accurate_is_taken(triton_squares, monkeypatch):
    assert triton_squares.tried(CPU).precision == "tf32x3"
    errors = {None: 1e-7, "tf32x3": 5e-7, "ieee": 3e-7}

    def tried():
        triton_squares.tried.cache_clear()
        return triton_squares.tried(CPU)

    def error(device, kernel):
        return errors[kernel and kernel.precision]

    monkeypatch.setattr(triton_squares, "_error", error)
    assert tried() == triton_squares.SquaresKernel("ieee")
    assert "ieee" in tried().description
    errors["ieee"] = 6e-7
    assert tried() == "its relative error is 5.0e-07 in tf32x3, 6.0e-07 in ieee"


def test_the_kernel_is_compiled_for_gpus_and_units_do_not_add_to_gradients_themselves(
    triton_squares,
):
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("worker_compiled_kernel.py")],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert len(compiled) == 6
    tile = triton_squares.TILE_O * triton_squares.TILE_I // (32 * triton_squares._WARPS)
    for one in compiled:
        assert one["bytes"] > 1000
        assert bool(one["units"]) == (one["precision"] == "tf32x3")
        # One for each element of a thread's part of the tile: for each position too, without units.
        multiply_adds = one["multiply_adds"] + 2 * one["pairs"]
        assert multiply_adds == tile * (1 if one["units"] else 1 + triton_squares.STEP)


def test_a_kernel_that_cannot_be_compiled_is_done_without(triton_squares, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")

    monkeypatch.setattr(triton_squares.SquaresKernel, "add_", fails)
    assert triton_squares.tried(CPU) == "RuntimeError: Failed to find C compiler."


def test_a_fit_by_the_kernel_has_the_same_factors(kernel, monkeypatch):
    def fit():
        return estimate_factors(build("llama_bias").float(), examples(12), labels="data")

    expected = fit()
    monkeypatch.setattr(refit, "squares_kernel", lambda device: kernel)
    factors = fit()
    for name in expected.modules:
        lambdas = [one.module(name).lambda_OI for one in (factors, expected)]
        assert relative(*lambdas) < 1e-5
    halves = [one.manifest["halves"] for one in (factors, expected)]
    assert halves[0].keys() == halves[1].keys()
