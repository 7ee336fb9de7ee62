import pytest
import torch
from helpers.dense import relative
from helpers.float32_settings import float32_settings

from ekfac_dist.curvature import covariance
from ekfac_dist.curvature.covariance import add_outer_products_, mirror_, multiplies_wide


@pytest.mark.parametrize("size", [1, 5, 191, 192, 193, 500, 2100])
@pytest.mark.parametrize("bias", [False, True])
def test_the_mirrored_half_equals_the_full_product(size, bias):
    torch.manual_seed(0)
    total = torch.zeros(size + bias, size + bias, dtype=torch.float64)
    rows = torch.randn(40, size, dtype=torch.float64) * torch.linspace(0.1, 2, size)
    for part in rows.split(15):
        add_outer_products_(total, part, bias=bias)
    full = torch.cat([rows, torch.ones(40, 1, dtype=torch.float64)], 1) if bias else rows
    assert relative(mirror_(total), full.T @ full) < 1e-14
    assert torch.equal(total, total.T)


def test_low_precision_rows_are_summed_in_the_precision_of_the_sum():
    torch.manual_seed(0)
    rows = (torch.rand(4000, 4) + 1).to(torch.bfloat16)
    total = torch.zeros(4, 4)
    for part in rows.split(10):
        add_outer_products_(total, part, bias=False)
    exact = rows.double().T @ rows.double()
    assert relative(mirror_(total).double(), exact) < 1e-5
    running = torch.zeros(4, 4, dtype=torch.bfloat16)
    for part in rows.split(10):
        running += part.T @ part
    assert relative(running.double(), exact) > 1e-2  # what low-precision sums would have done


def test_no_rows_add_nothing():
    total = torch.zeros(3, 3)
    add_outer_products_(total, torch.empty(0, 2), bias=True)
    assert not total.any()


def _products_in(dtype):
    """`torch.mm` of a device that gives products in a dtype; None: it has no such products."""

    def mm(left, right, *, out_dtype):
        if dtype is None:
            raise NotImplementedError("no such kernel")
        return (left.float() @ right.float()).to(dtype).to(out_dtype)

    return mm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("given", [None, torch.float32, "rounded"])
def test_sixteen_bit_rows_are_multiplied_as_if_they_were_wide(dtype, bias, given, monkeypatch):
    torch.manual_seed(0)
    rows, size = torch.randn(50, 300).to(dtype), 300 + bias
    expected, total = torch.zeros(2, size, size)
    add_outer_products_(expected, rows.float(), bias=bias)
    monkeypatch.setattr(torch, "mm", _products_in(dtype if given == "rounded" else given))
    multiplies_wide.cache_clear()
    try:
        assert multiplies_wide(rows.device, dtype) == (given == torch.float32)
        add_outer_products_(total, rows, bias=bias)
    finally:
        multiplies_wide.cache_clear()
    assert relative(total.tril(), expected.tril()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sum_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rounds", [True, False])
def test_a_processor_that_rounds_to_bfloat16_does_so_with_such_rows_alone(
    dtype, sum_dtype, rounds, monkeypatch
):
    exact, precisions, num_rows = torch.Tensor.addmm_, [], []

    def addmm_(block, left, right):
        precisions.append(float32_settings()[2])
        num_rows.append(len(right))
        if rounds and precisions[-1] == "bf16" and block.dtype == torch.float32:
            left, right = left.bfloat16().float(), right.bfloat16().float()
        return exact(block, left, right)

    monkeypatch.setattr(covariance, "rounds_on", lambda device: rounds)
    monkeypatch.setattr(torch.Tensor, "addmm_", addmm_)
    torch.manual_seed(0)
    rows, total = torch.randn(60, 300).to(dtype), torch.zeros(300, 300, dtype=sum_dtype)
    before = float32_settings()
    add_outer_products_(total, rows, bias=False)
    is_exact = dtype == torch.bfloat16 and sum_dtype == torch.float32
    assert (set(precisions) == {"bf16"}) == (rounds and is_exact)
    assert set(num_rows) == ({256} if rounds and is_exact else {60})
    assert relative(mirror_(total).double(), rows.double().T @ rows.double()) < 1e-6
    assert float32_settings() == before
