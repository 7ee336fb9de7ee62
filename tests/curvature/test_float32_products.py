"""Products of float32: full precision whatever the caller set, and by which library."""

import platform

import pytest
import torch
from helpers.float32_settings import float32_settings, restore_float32

from ekfac_dist.curvature import float32_products
from ekfac_dist.curvature.float32_products import (
    precisely,
    rounded_to_bfloat16,
    rounds_to_bfloat16,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _restored():
    yield
    restore_float32()


def test_products_keep_all_bits_of_float32_on_this_processor():
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("medium")
    for m, k, n in ((64, 64, 64), (1, 300, 70), (2048, 16, 768), (33, 1000, 5), (512, 700, 300)):
        left, right = torch.randn(m, k), torch.randn(k, n)
        expected = left.double() @ right.double()
        with precisely(CPU):
            error = (left @ right - expected).norm() / expected.norm()
            batch = torch.bmm(left[None].expand(3, m, k), right[None].expand(3, k, n))
        assert error < 1e-6
        assert (batch - expected).norm() / expected.norm() < 2e-6


def test_an_error_inside_restores_the_setting():
    before = float32_settings()
    for context in (precisely(CPU), rounded_to_bfloat16()):
        with pytest.raises(KeyError), context:
            raise KeyError
        assert float32_settings() == before


def test_a_processor_without_amx_does_not_round():
    """AMX alone has units for it, among processors of x86; elsewhere it is as it is found."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("not a processor of x86")
    assert torch.cpu._is_amx_tile_supported() or not rounds_to_bfloat16()


@pytest.mark.parametrize("rounds", [True, False])
def test_a_library_that_rounds_is_found_out(monkeypatch, rounds):
    expected = rounds or rounds_to_bfloat16()
    float32_products.rounds_to_bfloat16.cache_clear()
    exact, seen = torch.Tensor.__matmul__, []

    def product(left, right):
        seen.append(float32_settings()[2])
        if rounds and len(seen) == 3:  # by one kernel of several
            left, right = left.bfloat16().float(), right.bfloat16().float()
        return exact(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    try:
        assert rounds_to_bfloat16() == expected
    finally:
        float32_products.rounds_to_bfloat16.cache_clear()
    assert set(seen) == {"bf16"}


def test_a_setting_of_all_devices_is_still_followed_after_exact_products():
    torch.backends.fp32_precision = "tf32"
    with precisely(CPU):
        pass
    torch.backends.fp32_precision = "ieee"
    assert float32_settings() == ("highest", "ieee", "ieee")


def test_a_torch_that_has_only_the_old_setting_computes_exactly_too(monkeypatch):
    for backend in (torch.backends.cuda, torch.backends.mkldnn):
        monkeypatch.setattr(backend, "matmul", object())
    asked = []
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    with precisely(CPU):
        assert asked == ["highest"]
    assert asked == ["highest", "high"]
