"""Inner products of gradients: every way of computing them, and approximations of low rank."""

import pytest
import torch
from helpers.dense import relative

from ekfac_dist.curvature import costs, products


def rows_of(lengths, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), width, generator=generator, dtype=torch.float64)


LENGTHS = [[4, 4, 4], [5, 3, 1, 2], [1], [6]]


def sums_of_outer_products(acts, grads, lengths):
    """Each sequence's gradient, position by position."""
    found, start = torch.zeros(len(lengths), grads.shape[1], acts.shape[1]).double(), 0
    for k, length in enumerate(lengths):
        for t in range(start, start + length):
            found[k] += torch.outer(grads[t], acts[t])
        start += length
    return found


def small_tiles(monkeypatch, num_bytes, rows=1):
    monkeypatch.setattr(costs, "TILE_BYTES", {True: num_bytes, False: num_bytes})
    monkeypatch.setattr(costs, "MIN_TILE_ROWS", rows)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    ("held", "rows", "tiles"), [(1, 1, "3n"), (80, 1, None), (120, 2, None), (10**9, 1, "1")]
)
def test_tiles_are_rows_of_sums_of_outer_products(lengths, held, rows, tiles, monkeypatch):
    small_tiles(monkeypatch, held, rows)
    acts, grads = rows_of(lengths, 5), rows_of(lengths, 3, seed=1)
    found = torch.full((len(lengths), 3, 5), torch.nan, dtype=torch.float64)
    number = 0
    for which, part, gradients in products.GradientTiles().of(acts, grads, lengths):
        assert gradients.nbytes <= max(held, 5 * 8 * rows)
        found[which, part] = gradients
        number += 1
    assert relative(found, sums_of_outer_products(acts, grads, lengths)) < 1e-12
    if tiles is not None:
        assert number == {"3n": 3 * len(lengths), "1": 1}[tiles]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_positions_sum_to_sequences(lengths):
    acts, grads = rows_of(lengths, 5), rows_of(lengths, 3, seed=1)
    queries = rows_of([2], 15, seed=2).view(2, 3, 5)
    by_position = torch.stack([products.position_scores(q, acts, grads) for q in queries])
    found = products.sum_by_sequence(by_position, lengths)
    gradients = sums_of_outer_products(acts, grads, lengths)
    assert relative(found, torch.einsum("qoi,noi->qn", queries, gradients)) < 1e-12


@pytest.mark.parametrize("held", [1, 100, 10**9])
def test_rows_of_low_rank_queries_are_those_of_the_product(held, monkeypatch):
    small_tiles(monkeypatch, held)
    left, right = rows_of([8], 3, seed=2).view(4, 2, 3).mT, rows_of([8], 5, seed=3).view(4, 2, 5).mT
    expected = torch.einsum("qor,qir->qoi", left, right)
    for rows in (slice(0, 3), slice(1, 3), slice(2, 3)):
        found = torch.full_like(expected[:, rows], torch.nan)
        for queries, part in products.query_rows(left, right, rows, products.ScratchBuffer()):
            assert part.nbytes <= max(held, part[0].nbytes)
            found[queries] = part
        assert relative(found, expected[:, rows]) < 1e-12


def test_one_query_and_short_sequences_are_scored_by_position():
    assert products.by_position(1, [500], False)
    assert products.by_position(8, [1, 1, 1], False)
    assert not products.by_position(2, [100, 100], False)
    assert not products.by_position(32, [8, 8], False)
    assert not products.by_position(1, [500], True)  # its gradient is there anyway
    left, right = torch.ones(4, 30, 2), torch.ones(4, 40, 2)
    assert products.low_rank_by_position(left[:1], right[:1], [100], False)
    left16, right16 = left.repeat(4, 1, 1), right.repeat(4, 1, 1)
    assert not products.low_rank_by_position(left16, right16, [100], False)
    assert not products.low_rank_by_position(left[:1], right[:1], [100], True)


@pytest.mark.parametrize("held", [1, 200, 10**9])
def test_low_rank_positions_are_those_of_the_product(held, monkeypatch):
    small_tiles(monkeypatch, held)
    acts, grads = rows_of([7], 5), rows_of([7], 3, seed=1)
    left, right = rows_of([8], 3, seed=2).view(4, 2, 3).mT, rows_of([8], 5, seed=3).view(4, 2, 5).mT
    found = products.low_rank_position_scores(left, right, acts, grads)
    for q in range(4):
        expected = products.position_scores(left[q] @ right[q].T, acts, grads)
        assert relative(found[q], expected) < 1e-12


def test_the_bias_coordinate_is_one():
    assert products.with_bias(torch.zeros(2, 3)).tolist() == [[0, 0, 0, 1]] * 2


@pytest.mark.parametrize(("quickly", "worse"), [(False, 1.02), (True, 1.05)])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (300, 200), (9, 7), (1, 5)])
def test_a_low_rank_approximation_is_nearly_the_best(shape, quickly, worse):
    matrix = rows_of([shape[0]], shape[1]) * torch.logspace(0, -2, shape[1]).double()
    values = torch.linalg.svdvals(matrix)
    for rank in (1, min(4, *shape), min(shape)):
        left, right = products.low_rank(matrix, rank, quickly=quickly)
        assert left.shape == (shape[0], rank)
        assert right.shape == (shape[1], rank)
        best = values[rank:].norm().item()
        assert (matrix - left @ right.T).norm() <= worse * best + 1e-12 * matrix.norm()


def test_a_matrix_of_low_rank_is_approximated_exactly_and_the_same_each_time():
    matrix = rows_of([100], 3) @ rows_of([3], 80, seed=1)
    left, right = products.low_rank(matrix, 5)
    assert relative(left @ right.T, matrix) < 1e-10
    again = products.low_rank(matrix, 5)
    assert torch.equal(left, again[0])
    assert torch.equal(right, again[1])


def test_only_a_small_matrix_is_decomposed_for_a_low_rank_approximation(monkeypatch):
    svd, sizes = torch.linalg.svd, []
    monkeypatch.setattr(torch.linalg, "svd", lambda m, **more: sizes.append(m.shape) or svd(m))
    for shape in ((300, 200), (200, 300)):
        products.low_rank(rows_of([shape[0]], shape[1]), 8)
    assert all(max(size) <= 16 for size in sizes), sizes
    assert len(sizes) == 2


def test_a_matrix_of_zeros_has_an_approximation():
    left, right = products.low_rank(torch.zeros(50, 60), 3)
    assert (left @ right.T == 0).all()
