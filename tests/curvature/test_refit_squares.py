"""Sums of squares of sequences' gradients: where a kernel adds them, and what it is given."""

import pytest
import torch
from helpers.dense import relative

from ekfac_dist.curvature import refit
from ekfac_dist.curvature.refit import EvenSquares, add_sequence_squares_, squares_kernel

CPU = torch.device("cpu")
LENGTHS = (5, 0, 1, 32, 33, 70, 0)


class Dense:
    """A kernel of the same interface, by dense float64 products."""

    def __init__(self):
        self.num_calls = 0

    def add_(self, lambda_OI, acts_MI, grads_MO, bounds):
        self.num_calls += 1
        for start, stop in bounds:
            product = grads_MO[start:stop].double().T @ acts_MI[start:stop].double()
            lambda_OI += product.square()


@pytest.fixture
def dense(monkeypatch):
    kernel = Dense()
    monkeypatch.setattr(refit, "squares_kernel", lambda device: kernel)
    return kernel


def rows(num_outputs, num_inputs):
    torch.manual_seed(0)
    return torch.randn(sum(LENGTHS), num_inputs), torch.randn(sum(LENGTHS), num_outputs)


def products(acts_MI, grads_MO, lengths=LENGTHS):
    """G_n of each sequence, in float64."""
    sides = zip(grads_MO.double().split(lengths), acts_MI.double().split(lengths), strict=True)
    return torch.stack([grads.T @ acts for grads, acts in sides])


def test_only_float32_rows_in_the_eigenbasis_are_for_the_kernel(dense):
    acts, grads = rows(6, 8)
    bases = {"basis_II": None, "basis_OO": None}
    eye_II, eye_OO = [torch.eye(8)], [torch.eye(6)]
    for given, dtype, lengths, num_calls in (
        (bases, torch.float32, LENGTHS, 1),
        (bases, torch.float64, LENGTHS, 0),
        (bases, torch.float32, (1,) * sum(LENGTHS), 0),  # one product of squares
        (bases | {"basis_II": eye_II}, torch.float32, LENGTHS, 0),
        (bases | {"basis_OO": eye_OO}, torch.float32, LENGTHS, 0),
    ):
        dense.num_calls = 0
        total = torch.ones(6, 8, dtype=dtype)
        add_sequence_squares_(total, acts.to(dtype), grads.to(dtype), lengths, bias=False, **given)
        assert dense.num_calls == num_calls
        assert relative(total.double(), 1 + products(acts, grads, lengths).square().sum(0)) < 1e-6


def test_squares_of_even_sequences_are_summed_in_their_rows(dense):
    acts, grads = rows(6, 8)
    are_even = [True, True, False, False, True, True, False]
    even = EvenSquares(torch.zeros(2, 8, dtype=torch.float64), torch.tensor([4, 1]), are_even)
    add_sequence_squares_(
        torch.zeros(6, 8),
        *(acts, grads, LENGTHS),
        basis_II=None,
        basis_OO=None,
        bias=False,
        even=even,
    )
    expected = products(acts, grads)[torch.tensor(are_even)].square().sum(0)
    assert relative(even.sums_kI, expected[[4, 1]]) < 1e-6


def test_there_is_none_on_a_processor_and_none_without_triton(monkeypatch):
    assert squares_kernel(CPU) == "it is for GPUs"
    monkeypatch.setattr(refit, "find_spec", lambda name: None)
    squares_kernel.cache_clear()
    try:
        assert squares_kernel(torch.device("cuda")) == "Triton is not installed"
    finally:
        squares_kernel.cache_clear()
