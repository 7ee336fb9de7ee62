"""Gradients of sequences as few outer products, and their norms, against dense matrices."""

import pytest
import torch

from ekfac_dist.curvature.products import GradientTiles
from ekfac_dist.curvature.sequence_factors import sequence_factors
from ekfac_dist.curvature.sequence_norms import sequence_norms

LENGTHS = [7, 1, 12, 3, 30]
OUTPUTS, INPUTS = 9, 20


def rows(dtype, seed=0):
    """Inputs of many sizes, one of them enormous; small gradients; dense gradients."""
    draw = torch.Generator().manual_seed(seed)
    acts = torch.randn(sum(LENGTHS), INPUTS, generator=draw, dtype=torch.float64)
    acts *= torch.logspace(0, -2, INPUTS, dtype=torch.float64)
    acts[9] *= 1e3
    grads = 1e-3 * torch.randn(sum(LENGTHS), OUTPUTS, generator=draw, dtype=torch.float64)
    parts = zip(grads.split(LENGTHS), acts.split(LENGTHS), strict=True)
    return acts.to(dtype), grads.to(dtype), [g.T @ a for g, a in parts]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rank", [1, 2, 3, 8, 9])
def test_products_are_the_best_of_their_rank(dtype, tolerance, rank):
    acts, grads, dense = rows(dtype)
    left, right = sequence_factors(acts, grads, LENGTHS, rank)
    assert left.shape == (5, rank, OUTPUTS)
    assert right.shape == (5, rank, INPUTS)
    for G, u, v in zip(dense, left.double(), right.double(), strict=True):
        values = torch.linalg.svdvals(G)
        off = torch.linalg.norm(G - u.T @ v)
        assert off <= values[rank:].norm() + tolerance * values.norm()


@pytest.mark.parametrize("scale", [1e-24, 1e20])
def test_tiny_and_enormous_gradients_lose_nothing(scale):
    acts, grads, dense = rows(torch.float32)
    left, right = sequence_factors(acts, grads * scale, LENGTHS, 1)
    for G, u, v in zip(dense, left.double() / scale, right.double(), strict=True):
        off = torch.linalg.norm(G - u.T @ v)
        assert off <= torch.linalg.svdvals(G)[1:].norm() * (1 + 1e-4) + 1e-6 * G.norm()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_has_no_products_and_is_seen_in_the_norms(bad):
    acts, grads, _ = rows(torch.float32)
    grads[LENGTHS[0] + LENGTHS[1] + 2, 3] = bad  # of the third sequence
    left, _ = sequence_factors(acts, grads, LENGTHS, 2)
    assert not left[2].any()
    assert torch.isfinite(left).all()
    norms = sequence_norms(
        GradientTiles(), acts, grads, LENGTHS, torch.ones(OUTPUTS, INPUTS), 1.0, [1.0]
    )
    assert torch.isfinite(norms).all((1, 2)).tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("rank", [3, 9])
def test_a_sequence_of_no_more_positions_is_kept_whole(rank):
    acts, grads, dense = rows(torch.float32)
    left, right = sequence_factors(acts, grads, LENGTHS, rank)
    for n, (length, G) in enumerate(zip(LENGTHS, dense, strict=True)):
        if length <= rank or rank == OUTPUTS:
            found = left[n].double().T @ right[n].double()
            assert torch.linalg.norm(found - G) < 1e-6 * torch.linalg.norm(G)


def test_gradients_of_zero_and_of_rank_one():
    acts, grads = torch.zeros(6, INPUTS), torch.zeros(6, OUTPUTS)
    left, right = sequence_factors(acts, grads, [6], 2)
    assert not left.any()
    assert not right.any()
    acts[:], grads[:] = torch.arange(INPUTS) + 1.0, torch.arange(OUTPUTS) - 3.0
    left, right = sequence_factors(acts, grads, [6], 2)
    assert torch.allclose(left[0].T @ right[0], grads.T @ acts, rtol=1e-5)


@pytest.mark.parametrize("tile", [1, 1000, 2**20])
def test_norms_are_the_dense_ones(tile, monkeypatch):
    monkeypatch.setattr("ekfac_dist.curvature.products.tile_bytes", lambda device: tile)
    acts, grads, dense = rows(torch.float64)
    lam = torch.rand(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(2)).double()
    dampings = [1e-3, 0.1, 2.0]
    mean = 0.25
    found = sequence_norms(GradientTiles(), acts, grads, LENGTHS, lam, mean, dampings)
    assert found.shape == (5, 2, 3)
    for n, G in enumerate(dense):
        for d, damping in enumerate(dampings):
            solved = G / (lam / mean + damping)
            assert torch.allclose(found[n, 0, d], (G * solved).sum(), rtol=1e-10)
            assert torch.allclose(found[n, 1, d], solved.square().sum(), rtol=1e-10)
