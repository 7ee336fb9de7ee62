"""Products with split matrices: as exact as float32's, if matrix units sum few terms themselves."""

import pytest
import torch
from helpers.dense import relative

from ekfac_dist.curvature import split_matrices
from ekfac_dist.curvature.blocks import rotate_rows
from ekfac_dist.curvature.split_matrices import SplitMatrix, is_accurate, splits, whole

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def exact_sums(left, right):
    """A device whose 16-bit products have sums that are rounded once, to float32."""
    return (left.double() @ right.double()).float()


def truncated_sums(left, right):
    """Matrix units as NVIDIA's: every sum of 16 products is added, and truncated to float32."""
    total = torch.zeros(len(left), right.shape[1])
    for start in range(0, len(right), 16):
        some = slice(start, start + 16)
        added = total.double() + left[:, some].double() @ right[some].double()
        total = added.float()
        total = torch.where(
            total.double().abs() > added.abs(), total.nextafter(torch.zeros(())), total
        )
    return total


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr(split_matrices, "_wide", exact_sums)


def basis(size):
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0].float()


def test_the_parts_sum_to_the_matrix_bit_for_bit():
    torch.manual_seed(0)
    matrix = torch.cat([torch.randn(200, 30) * 10.0**power for power in (-25, -5, 0, 30)])
    split = SplitMatrix.of(matrix)
    assert {part.dtype for part in split.parts} == {torch.bfloat16}
    assert torch.equal(split.whole(), matrix)
    assert len(split) == len(matrix)
    assert split.nbytes == 1.5 * matrix.nbytes == split_matrices.SPLIT_BYTES * matrix.numel()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [7, 512, 1300])
def test_a_product_is_no_further_from_float64_than_the_float32_product(exact, size, bias):
    torch.manual_seed(0)
    rows, matrix = torch.randn(40, size).bfloat16(), basis(size + bias)
    with_one = torch.nn.functional.pad(rows.float(), (0, int(bias)), value=1.0)
    expected = with_one.double() @ matrix.double()
    product = SplitMatrix.of(matrix).rows_times(rows, bias=bias)
    assert product.dtype == torch.float32
    error, plain = ((p - expected).abs().max() for p in (product, with_one @ matrix))
    assert 0 < error <= plain


def test_units_that_truncate_their_sums_are_accurate_in_chunks_alone(monkeypatch):
    monkeypatch.setattr(split_matrices, "_wide", truncated_sums)
    monkeypatch.setattr(split_matrices, "_TRIED", (32, 4096, 32))
    assert is_accurate(CPU)
    monkeypatch.setattr(split_matrices, "CHUNK", 4096)
    assert not is_accurate(CPU)


def test_products_that_leave_out_a_part_are_found_out(monkeypatch):
    monkeypatch.setattr(split_matrices, "_TRIED", (32, 300, 32))
    monkeypatch.setattr(split_matrices, "_wide", lambda x, q: exact_sums(x, q).bfloat16().float())
    assert not is_accurate(CPU)


@pytest.mark.parametrize("bias", [False, True])
def test_float32_rows_are_multiplied_in_float32(bias):
    torch.manual_seed(0)
    rows, matrix = torch.randn(5, 20), basis(20 + bias)
    expected = rotate_rows(rows, [matrix], bias=bias)
    assert torch.equal(SplitMatrix.of(matrix).rows_times(rows, bias=bias), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_rows_are_rotated_by_split_blocks_as_by_whole_ones(exact, bias):
    torch.manual_seed(0)
    blocks = [basis(9), basis(8), basis(8)]
    split = [SplitMatrix.of(block) for block in blocks]
    rows = torch.randn(30, 25 - bias).bfloat16()
    expected = rotate_rows(rows.double(), [block.double() for block in blocks], bias=bias)
    assert relative(rotate_rows(rows, split, bias=bias).double(), expected) < 1e-7
    assert all(torch.equal(w, b) for w, b in zip(whole(split), blocks, strict=True))


@pytest.mark.parametrize(
    ("capability", "pays"),
    [((9, 0), True), ((8, 0), True), ((10, 0), True), ((8, 9), False), ((7, 0), False)],
)
@pytest.mark.parametrize("broken", [None, "multiplies_wide", "is_accurate"])
def test_bases_are_split_on_gpus_on_which_it_pays_and_is_exact(
    monkeypatch, capability, pays, broken
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for check in ("multiplies_wide", "is_accurate"):
        monkeypatch.setattr(split_matrices, check, lambda *_, check=check: check != broken)
    split_matrices._pays_on.cache_clear()
    try:
        bf16, wide = torch.bfloat16, torch.float32
        assert splits(GPU, bf16, wide) == (pays and broken is None)
        others = [(GPU, torch.float16, wide), (GPU, wide, wide), (GPU, bf16, torch.float64)]
        assert not any(splits(*other) for other in [*others, (CPU, bf16, wide)])
    finally:
        split_matrices._pays_on.cache_clear()
