"""Inner products of gradients: every way of computing them, and approximations of low rank."""

import pytest
import torch
from helpers.dense import relative

from ekfac_dist.curvature import products


def rows(lengths, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), width, generator=generator, dtype=torch.float64)


LENGTHS = [[4, 4, 4], [5, 3, 1, 2], [1], [6]]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("held", [1, 10**9])
def test_sequence_gradients_are_sums_of_outer_products(lengths, held, monkeypatch):
    monkeypatch.setattr(products, "GRADIENT_BYTES", held)
    acts, grads = rows(lengths, 5), rows(lengths, 3, seed=1)
    found = torch.zeros(len(lengths), 3, 5, dtype=torch.float64)
    for which, gradients in products.SequenceGradients().of(acts, grads, lengths):
        found[which] = gradients
    start = 0
    for k, length in enumerate(lengths):
        expected = sum(torch.outer(grads[t], acts[t]) for t in range(start, start + length))
        assert relative(found[k], expected) < 1e-12
        start += length


@pytest.mark.parametrize("lengths", LENGTHS)
def test_positions_sum_to_sequences(lengths):
    acts, grads = rows(lengths, 5), rows(lengths, 3, seed=1)
    queries = rows([2], 15, seed=2).view(2, 3, 5)
    by_position = torch.stack([products.position_scores(q, acts, grads) for q in queries])
    found = products.sum_by_sequence(by_position, lengths)
    for which, gradients in products.SequenceGradients().of(acts, grads, lengths):
        expected = queries.flatten(1) @ gradients.flatten(1).T
        assert relative(found[:, which], expected) < 1e-12


def test_low_rank_positions_are_those_of_the_product():
    acts, grads = rows([7], 5), rows([7], 3, seed=1)
    left, right = rows([8], 3, seed=2).view(4, 2, 3).mT, rows([8], 5, seed=3).view(4, 2, 5).mT
    found = products.low_rank_position_scores(left, right, acts, grads)
    for q in range(4):
        expected = products.position_scores(left[q] @ right[q].T, acts, grads)
        assert relative(found[q], expected) < 1e-12


def test_the_bias_coordinate_is_one():
    assert products.with_bias(torch.zeros(2, 3)).tolist() == [[0, 0, 0, 1]] * 2


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (9, 7), (1, 5)])
def test_a_low_rank_approximation_is_nearly_the_best(shape):
    matrix = rows([shape[0]], shape[1]) * torch.logspace(0, -2, shape[1]).double()
    values = torch.linalg.svdvals(matrix)
    for rank in (1, min(4, *shape), min(shape)):
        left, right = products.low_rank(matrix, rank)
        assert left.shape == (shape[0], rank)
        assert right.shape == (shape[1], rank)
        best = values[rank:].norm().item()
        assert (matrix - left @ right.T).norm() <= 1.02 * best + 1e-12 * matrix.norm()


def test_a_matrix_of_low_rank_is_approximated_exactly_and_the_same_each_time():
    matrix = rows([100], 3) @ rows([3], 80, seed=1)
    left, right = products.low_rank(matrix, 5)
    assert relative(left @ right.T, matrix) < 1e-10
    again = products.low_rank(matrix, 5)
    assert torch.equal(left, again[0])
    assert torch.equal(right, again[1])


def test_only_a_small_matrix_is_decomposed_for_a_low_rank_approximation(monkeypatch):
    svd, sizes = torch.linalg.svd, []
    monkeypatch.setattr(torch.linalg, "svd", lambda m, **more: sizes.append(m.shape) or svd(m))
    for shape in ((300, 200), (200, 300)):
        products.low_rank(rows([shape[0]], shape[1]), 8)
    assert all(max(size) <= 16 for size in sizes), sizes
    assert len(sizes) == 2


def test_a_matrix_of_zeros_has_an_approximation():
    left, right = products.low_rank(torch.zeros(50, 60), 3)
    assert (left @ right.T == 0).all()
