"""Halves of the data: sketches are unbiased, sampled rows stand for all, predictions come true."""

import math

import pytest
import torch

from ekfac_dist.curvature import halves, score_change
from ekfac_dist.curvature.halves import (
    add_sketches_,
    even_mask,
    fixed_vectors,
    relative_difference,
)
from ekfac_dist.curvature.score_change import (
    DAMPINGS,
    HalfOfLambda,
    SampledRows,
    ScoreChange,
    Turning,
    half_of_lambda,
    num_sampled,
)


def sequences(number=24, size=6, seed=0):
    """Vectors [T, size] at the positions of each sequence, anisotropic."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(1, 3, size, dtype=torch.float64)
    return [
        torch.randn(int(length), size, generator=generator, dtype=torch.float64) * scale
        for length in torch.randint(1, 9, (number,), generator=generator)
    ]


def estimate(vectors, blocks=1):
    """What is said of halves of some sequences, from sums as a pass makes them."""
    everything = torch.cat(vectors)
    size = everything.shape[1]
    sizes = [size // blocks] * blocks
    mask = even_mask([k % 2 == 0 for k in range(len(vectors))], list(map(len, vectors)))
    even_m = torch.from_numpy(mask.nonzero()[0])
    sketch, signs = torch.zeros(halves.NUM_VECTORS, size).double(), fixed_vectors(size, everything)
    add_sketches_([sketch], everything, even_m, [len(even_m)], signs, sizes)
    sums = [part.T @ part for part in everything.split(sizes, 1)]
    return relative_difference(sketch, len(even_m), sums, len(everything))


def exact(vectors, blocks=1):
    size = vectors[0].shape[1]
    mask = torch.block_diag(*[torch.ones(size // blocks, size // blocks)] * blocks).double()
    even, odd = (torch.cat(half) for half in (vectors[::2], vectors[1::2]))
    difference = (even.T @ even / len(even) - odd.T @ odd / len(odd)) * mask
    whole = torch.cat(vectors)
    scale = math.sqrt(len(even) * len(odd)) / len(whole)
    return (scale * difference.norm() / (whole.T @ whole / len(whole) * mask).norm()).item()


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_mean_over_fixed_vectors_of_many_seeds_is_the_difference(
    blocks, monkeypatch: pytest.MonkeyPatch
):
    vectors = sequences()
    squares = []
    for seed in range(400):
        monkeypatch.setattr(halves, "SEED", seed)
        squares.append(estimate(vectors, blocks) ** 2)
    error = torch.tensor(squares).std() / math.sqrt(len(squares))
    assert abs(sum(squares) / len(squares) - exact(vectors, blocks) ** 2) < 4 * error
    assert error < 0.04 * exact(vectors, blocks) ** 2


def test_equal_halves_agree_and_a_half_without_positions_is_not_known():
    vectors = [each for each in sequences(6) for _ in range(2)]
    assert estimate(vectors) < 1e-12
    assert estimate(vectors[:1]) is None
    assert estimate([vectors[0][:0], vectors[1]]) is None
    assert estimate([torch.zeros_like(each) for each in vectors]) is None
    huge = [torch.full((1, 6), 1e19), torch.full((1, 6), 2e18)]
    assert torch.cat(huge).square().sum(0).isfinite().all()  # what a pass sums is no infinity
    assert estimate(huge) is None


@pytest.mark.parametrize(("size", "number"), [(5, 5), (16, 16), (100, 16), (4096, 32)])
def test_sampled_rows_stand_for_all_and_have_the_largest_eigenvalues(size: int, number: int):
    values = torch.rand(size, generator=torch.Generator().manual_seed(0))
    rows = SampledRows.of(values)
    assert num_sampled(size) == len(rows.indices_k) == number
    assert rows.weights_k.sum() == size
    assert (rows.indices_k.diff() > 0).all()
    assert set(values.topk(number // 2).indices.tolist()) <= set(rows.indices_k.tolist())
    # Of a smooth function of the eigenvalues they have nearly the mean.
    mean = (rows.weights_k * values[rows.indices_k] ** 2).sum() / size
    assert mean == pytest.approx((values.double() ** 2).mean().item(), rel=0.03)


def drawn_squares(number, shape, seed):
    """Squares [N, O, I] of the gradients of sequences, their means falling along both sides."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.outer(*(1 / torch.arange(1.0, n + 1) for n in shape)).double()
    return means * torch.randn(number, *shape, generator=generator, dtype=torch.float64) ** 2


def turning_of(values_I, difference=0.0):
    return Turning.of(values_I, [len(values_I)], difference, values_I.device)


def halves_of(squares_NOI, damping):
    number = len(squares_NOI)
    lambda_OI = squares_NOI.mean(0)
    rows = SampledRows.of(lambda_OI.sum(1))
    even_kI = squares_NOI[::2].sum(0)[rows.indices_k]
    turning = turning_of(lambda_OI.sum(0))
    known = half_of_lambda(lambda_OI, even_kI, rows, (number + 1) // 2, number, turning)
    assert isinstance(known, HalfOfLambda)
    return known.scores[damping]


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize(("number", "size", "trials"), [(400, 8, 150), (401, 40, 25)])
def test_predictions_are_on_average_those_of_scores_from_parts_and_from_more(
    number: int, size: int, trials: int, damping: float
):
    shares = (0.5, 0.25, 2)
    predicted, measured = torch.zeros(3), torch.zeros(3)
    for seed in range(trials):
        squares = drawn_squares(2 * number, (size, 30), seed)
        of_all = squares[:number].mean(0)
        change = halves_of(squares[:number], damping)
        predicted += torch.tensor([1 - change.correlation(share) for share in shares])
        # Of gradients with mean squares Λ: the correlation of Σ qz/(Λ+λ) and Σ qz/(Λ'+λ').
        for k, share in enumerate(shares):
            of_part = squares[: int(share * number)].mean(0)
            one, other = (of_all / (x + damping * x.mean()) for x in (of_all, of_part))
            measured[k] += 1 - ((one * other).sum() / (one.norm() * other.norm())).item()
    assert ((predicted / measured).log().abs() < 0.2).all(), predicted / measured
    assert change.correlation(0.5) < change.correlation(2) < change.correlation(1) == 1


def eigenbasis_factors(acts_NI, grads_NO):
    """A's eigenvalues, the eigenvectors of both factors, and the squares whose mean is Λ."""
    values, basis_II = torch.linalg.eigh(acts_NI.T @ acts_NI / len(acts_NI))
    basis_OO = torch.linalg.eigh(grads_NO.T @ grads_NO / len(acts_NI)).eigenvectors
    squares = torch.einsum("no,ni->noi", grads_NO @ basis_OO, acts_NI @ basis_II) ** 2
    return values, torch.kron(basis_OO, basis_II), squares


def dense_inverse(basis, squares_NOI, damping):
    lambdas = squares_NOI.mean(0).flatten()
    return basis @ torch.diag(1 / (lambdas + damping * lambdas.mean())) @ basis.T


@pytest.mark.parametrize("damping", [0.001, 0.1])
def test_turns_of_eigenbases_are_predicted_for_gaussian_inputs(damping: float):
    generator, number = torch.Generator().manual_seed(0), 300
    variances = 1 / torch.arange(1.0, 31).double()
    fisher = torch.cat([variances, variances])  # the diagonal, of single positions
    predicted = without_turns = measured = 0.0
    for _ in range(12):
        acts = torch.randn(number, 30, generator=generator).double() * variances.sqrt()
        grads = torch.randn(number, 2, generator=generator).double()
        values, basis, squares = eigenbasis_factors(acts, grads)
        of_all, rows = squares.mean(0), SampledRows.of(torch.ones(2))
        even_kI, difference = squares[::2].sum(0), exact(list(acts[:, None]))
        changes = [
            half_of_lambda(of_all, even_kI, rows, number // 2, number, turning).scores[damping]
            for turning in (turning_of(values, difference), turning_of(values))
        ]
        predicted += 1 - changes[0].correlation()
        without_turns += 1 - changes[1].correlation()
        one = dense_inverse(basis, squares, damping)
        other = dense_inverse(*eigenbasis_factors(acts[::2], grads[::2])[1:], damping)
        cross, *own = (
            torch.einsum("a,ab,b,ab->", fisher, x, fisher, y).item()
            for x, y in ((one, other), (one, one), (other, other))
        )
        measured += 1 - cross / math.sqrt(own[0] * own[1])
    assert predicted == pytest.approx(measured, rel=0.4)
    assert without_turns < 0.6 * measured


@pytest.mark.parametrize("blocks", [[6], [4, 2]])
def test_eigenvectors_turn_within_their_block_and_no_further_than_they_can(blocks):
    values = torch.tensor([1.0, 2, 2, 4, 1, 3])
    turning = Turning.of(values, blocks, 0.5, values.device)
    assert (turning.squares_Ij <= 0.25).all()
    assert turning.squares_Ij[1, 2] == pytest.approx(0.25)  # equal eigenvalues
    assert (turning.squares_Ij[0, 4] == 0) == (len(blocks) == 2)
    assert not Turning.of(values, blocks, 0.0, values.device).squares_Ij.any()


def test_some_inputs_stand_for_all_where_there_are_many(monkeypatch: pytest.MonkeyPatch):
    values = 1 / torch.arange(1.0, 401).flip(0)
    squares = drawn_squares(40, (6, 400), 0).flip(2)
    damped = (of_all := squares.mean(0)) + 0.1 * squares.mean()
    few = turning_of(values, 0.1).changed(of_all, damped, torch.ones(6).double())
    monkeypatch.setattr(score_change, "_SAMPLED_INPUTS", 400)
    exactly = turning_of(values, 0.1).changed(of_all, damped, torch.ones(6).double())
    assert few == pytest.approx(exactly, rel=0.1)


def test_scores_of_all_modules_are_predicted_from_their_sums():
    one, other = (halves_of(drawn_squares(50, (6, 9), seed), 0.1) for seed in (0, 1))
    both, twice = one + other, one + one
    assert both.signal == one.signal + other.signal
    # Two that are alike: their v over √2.
    v, v_of_two = (1 / change.correlation() ** 2 - 1 for change in (one, twice))
    assert v_of_two == pytest.approx(v / math.sqrt(2))
    assert max(one.correlation(), other.correlation()) < both.correlation() < 1
    assert ScoreChange().correlation() is None


def test_a_factor_common_to_all_of_a_half_changes_no_correlation():
    squares = drawn_squares(50, (6, 9), 0)
    squares[::2] = 3 * squares[::2].mean(0)
    squares[1::2] = squares[::2].mean(0) / 3
    assert halves_of(squares, 10.0).correlation() == pytest.approx(1, abs=1e-12)


def test_what_is_not_known_is_not_predicted():
    squares = drawn_squares(4, (3, 4), 0)
    lambda_OI, rows = squares.mean(0), SampledRows.of(torch.ones(3))
    even_kI, turning = squares[::2].sum(0), turning_of(torch.ones(4))
    assert half_of_lambda(lambda_OI, even_kI, rows, 2, 4, turning) is not None
    for num_even, number in ((0, 4), (4, 4)):
        assert half_of_lambda(lambda_OI, even_kI, rows, num_even, number, turning) is None
    assert half_of_lambda(lambda_OI, even_kI * math.nan, rows, 2, 4, turning) is None
    nothing = half_of_lambda(lambda_OI * 0, even_kI * 0, rows, 2, 4, turning)
    assert nothing is not None
    assert nothing.difference == 0
    assert nothing.scores[0.1].correlation() is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 40, 10**6])
def test_sketches_of_several_factors_are_those_of_each(bias, chunk, monkeypatch):
    monkeypatch.setattr(halves, "_CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    numbers, sizes = [3, 0, 5, 1], [3, 2 + bias]
    vectors = torch.randn(12, 5).double()
    even_m = torch.tensor([0, 2, 3, 4, 6, 7, 8, 9, 11])
    signs = fixed_vectors(5 + bias, vectors)
    found = torch.ones(4, len(signs), 5 + bias).double()
    add_sketches_(list(found), vectors, even_m, numbers, signs, sizes)
    with_bias = torch.cat([vectors, torch.ones(12, bias)], 1)
    mask = torch.block_diag(*[torch.ones(size, size) for size in sizes])
    for sketch, own in zip(found, even_m.split(numbers), strict=True):
        total = with_bias[own].T @ with_bias[own] * mask
        torch.testing.assert_close(sketch, 1 + signs @ total)
