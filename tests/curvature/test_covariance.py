from itertools import pairwise

import pytest
import torch
from helpers.dense import relative
from helpers.float32_settings import float32_settings

from ekfac_dist.curvature import covariance
from ekfac_dist.curvature.costs import block_rows
from ekfac_dist.curvature.covariance import add_outer_products_, mirror_, multiplies_wide

CPU = torch.device("cpu")


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


def waves(size, rows, num_multiprocessors):
    """In how many waves of tiles of 128 × 128 a GPU computes a covariance in block rows."""
    ends = [min(start + rows, size) for start in range(0, size, rows)]
    tiles = [-(-(end - start) // 128) * -(-end // 128) for start, end in pairwise([0, *ends])]
    return sum(-(-number // num_multiprocessors) for number in tiles)


# Of an A100, an H100 and a B200. For other GPUs than an H100 the choice need not be the best.
@pytest.mark.parametrize(("multiprocessors", "over"), [(108, 1.05), (132, 1), (148, 1.05)])
def test_block_rows_of_a_gpu_take_few_waves(multiprocessors, over):
    own, whole, of_cpu = [], [], []
    for size in (1, 768, 1408, 2048, 2880, 4096, 5120, 7168, 8192, 11_008, 14_336, 28_672):
        gpus, cpus = (block_rows(size, torch.device(kind)) for kind in ("cuda", "cpu"))
        assert gpus % 128 == 0
        of_size = [waves(size, rows, multiprocessors) for rows in (gpus, size, cpus)]
        assert of_size[0] <= over * min(of_size), size
        for found, number in zip((own, whole, of_cpu), of_size, strict=True):
            found.append(number)
    assert sum(own[:8]) < 0.8 * min(sum(whole[:8]), sum(of_cpu[:8]))


@pytest.mark.parametrize("size", [1025, 2100])
def test_block_rows_of_a_gpu_give_the_same_sums(size, monkeypatch):
    torch.manual_seed(0)
    vectors = torch.randn(7, size).double()
    sums = []
    for device in (CPU, torch.device("cuda")):
        monkeypatch.setattr(covariance, "block_rows", lambda n, _, on=device: block_rows(n, on))
        total = torch.zeros(size, size).double()
        add_outer_products_(total, vectors, bias=False)
        sums.append(mirror_(total))
    expected = vectors.T @ vectors
    for total in sums:
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
