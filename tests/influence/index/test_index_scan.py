"""Scans of an index in the dtype that it is stored in, on devices with units for it."""

from pathlib import Path

import pytest
import torch
from helpers.made_indices import arguments, make_store
from helpers.workshop import run_here
from safetensors.torch import load_file

from ekfac_dist.curvature import products
from ekfac_dist.curvature.float32_products import has_16_bit_units
from ekfac_dist.influence.index import scan


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = make_store(tmp_path_factory.mktemp("scan"))
    for dtype in ("bfloat16", "float32"):
        options = ("--index.rank", "3", "--index.dtype", dtype)
        assert run_here(arguments(root, root / dtype, *options)).returncode == 0
    return root


def scores(root, output, dtype, *options):
    words = ["query", "--factors", root / "store", "--queries", root / "queries.jsonl"]
    words += ["--index", root / dtype, "--output", output, "--scores.rescore", "0"]
    words += ["--scores.per_token", "none"]
    done = run_here([*words, *options])
    assert done.returncode == 0, done.stderr
    return load_file(output / "scores.safetensors")["scores"].double()


@pytest.fixture(params=[True, False], ids=["16-bit units", "none"])
def dtypes(request, monkeypatch):
    """The dtypes in which products are multiplied, on a device with 16-bit units or without."""
    seen, multiply = [], products.low_rank_position_scores

    def watched(left, right, acts, grads):
        seen.append((acts.dtype, grads.dtype))
        return multiply(left, right, acts, grads)

    has_units = request.param
    monkeypatch.setattr(
        scan, "has_16_bit_units", lambda device, dtype: has_units and dtype == torch.bfloat16
    )
    monkeypatch.setattr(products, "low_rank_position_scores", watched)
    return has_units, seen


def test_low_rank_scores_differ_by_the_rounding_of_16_bits_alone(root, tmp_path, dtypes):
    has_units, seen = dtypes
    found = scores(root, tmp_path / "found", "bfloat16", "--scores.rank", "4")
    expected = scores(root, tmp_path / "expected", "float32", "--scores.rank", "4")
    stored = torch.bfloat16 if has_units else torch.float32
    half = len(seen) // 2
    assert set(seen[:half]) == {(stored, stored)}
    assert set(seen[half:]) == {(torch.float32, torch.float32)}
    assert found.dtype == expected.dtype
    for found_N, expected_N in zip(found, expected, strict=True):
        assert (found_N - expected_N).norm() < 1e-2 * expected_N.norm()
        assert torch.corrcoef(torch.stack([found_N, expected_N]))[0, 1] > 0.9999


def test_whole_gradients_are_multiplied_in_float32(root, tmp_path, dtypes):
    _, seen = dtypes
    found = scores(root, tmp_path / "found", "bfloat16")
    expected = scores(root, tmp_path / "expected", "float32")
    assert seen == []
    for found_N, expected_N in zip(found, expected, strict=True):
        assert (found_N - expected_N).norm() < 1e-2 * expected_N.norm()


def test_this_processor_has_units_if_its_flags_say_so():
    cpu = torch.device("cpu")
    flags = Path("/proc/cpuinfo").read_text()
    assert has_16_bit_units(cpu, torch.bfloat16) == ("avx512_bf16" in flags)
    assert not has_16_bit_units(cpu, torch.float32)
    assert not has_16_bit_units(cpu, torch.float16)
