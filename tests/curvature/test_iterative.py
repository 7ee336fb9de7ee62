"""Iterative solves against dense ones, for matrices given whole."""

import pytest
import torch
from helpers.dense import relative

from ekfac_dist.curvature.iterative import astra, conjugate_gradients
from ekfac_dist.errors import NonFiniteError

SHAPES = {"one": (3, 4), "two": (5, 2)}
SIZES = [12, 10]
SIZE = sum(SIZES)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def positive(rank=SIZE, smallest=0.0):
    factor = torch.randn(SIZE, rank, dtype=torch.float64)
    return factor @ factor.T + smallest * torch.eye(SIZE, dtype=torch.float64)


def block(rows):
    parts = rows.split(SIZES, 1)
    return {
        name: part.reshape(-1, *shape).clone()
        for (name, shape), part in zip(SHAPES.items(), parts, strict=True)
    }


def flat(vectors):
    return torch.cat([values.flatten(1) for values in vectors.values()], 1)


class Matrix:
    """Products with a matrix, which remember of which right-hand sides they were."""

    def __init__(self, matrix):
        self.matrix, self.asked = matrix, []

    def __call__(self, of, into, numbers):
        self.asked.append(list(numbers))
        for values in into.values():
            values.fill_(torch.nan)  # what was not asked for may hold anything
        for name, values in block(flat(of)[list(numbers)] @ self.matrix).items():
            into[name][list(numbers)] = values


def inverse_of(matrix):
    inverse = torch.linalg.inv(matrix)

    def precondition(of, into):
        for name, values in block(flat(of) @ inverse).items():
            into[name].copy_(values)

    return precondition


def solved(matrix, preconditioner, rows, iterations=200, tolerance=1e-13):
    product = Matrix(matrix)
    solution = conjugate_gradients(
        product,
        inverse_of(preconditioner),
        block(rows),
        iterations=iterations,
        tolerance=tolerance,
    )
    return solution, product


def test_conjugate_gradients_reach_the_dense_solution():
    matrix, rows = positive(8, 0.1), torch.randn(3, SIZE, dtype=torch.float64)
    solution, _ = solved(matrix, positive(SIZE, 1.0), rows)
    assert relative(flat(solution.vectors), torch.linalg.solve(matrix, rows.T).T) < 1e-10
    last = [row[row.isfinite()][-1] for row in solution.residuals]
    assert max(last) <= 1e-13


def test_residuals_are_of_the_solution_after_so_many_steps():
    matrix, rows = positive(8, 0.1), torch.randn(2, SIZE, dtype=torch.float64)
    for iterations in (0, 1, 3):
        solution, product = solved(matrix, positive(SIZE, 1.0), rows, iterations)
        residual = rows - flat(solution.vectors) @ matrix
        assert solution.residuals.shape == (2, iterations + 1)
        expected = residual.norm(dim=1) / rows.norm(dim=1)
        assert relative(solution.residuals[:, -1], expected) < 1e-10
        assert len(product.asked) == iterations + 1


def test_the_start_is_the_preconditioners_solution():
    matrix, preconditioner = positive(8, 0.1), positive(SIZE, 1.0)
    rows = torch.randn(2, SIZE, dtype=torch.float64)
    solution, _ = solved(matrix, preconditioner, rows, iterations=0)
    assert relative(flat(solution.vectors), torch.linalg.solve(preconditioner, rows.T).T) < 1e-12


def test_a_block_is_solved_as_each_right_hand_side_alone():
    matrix, preconditioner = positive(8, 0.1), positive(SIZE, 1.0)
    rows = torch.randn(4, SIZE, dtype=torch.float64)
    rows[1] *= 1e4
    together, _ = solved(matrix, preconditioner, rows, 4)
    for number, row in enumerate(rows):
        alone, _ = solved(matrix, preconditioner, row[None], 4)
        assert relative(flat(together.vectors)[number], flat(alone.vectors)[0]) < 1e-12
        assert relative(together.residuals[number], alone.residuals[0]) < 1e-10


def test_it_ends_at_once_where_the_preconditioner_is_the_matrix():
    matrix = positive(SIZE, 1.0)
    solution, product = solved(matrix, matrix, torch.randn(2, SIZE, dtype=torch.float64), 5, 1e-9)
    assert len(product.asked) <= 2
    assert solution.residuals[:, -1].max() < 1e-9


def test_right_hand_sides_that_are_finished_ask_for_no_more():
    matrix, preconditioner = positive(8, 0.1), positive(SIZE, 1.0)
    rows = torch.randn(3, SIZE, dtype=torch.float64)
    rows[1] = 0  # finished from the start
    solution, product = solved(matrix, preconditioner, rows, 3)
    assert product.asked == [[0, 1, 2], [0, 2], [0, 2], [0, 2]]
    assert solution.residuals[1].tolist()[:1] == [0.0]
    assert solution.residuals[1, 1:].isnan().all()
    assert not flat(solution.vectors)[1].any()


def test_a_direction_of_no_positive_curvature_ends_its_right_hand_side():
    matrix = torch.diag(torch.cat([torch.ones(SIZE - 1), torch.tensor([-1.0])]).double())
    rows = torch.zeros(2, SIZE, dtype=torch.float64)
    rows[0, -1], rows[1, :2] = 1.0, 1.0
    identity = 2 * torch.eye(SIZE, dtype=torch.float64)
    solution, _ = solved(matrix, identity, rows, 5)
    assert relative(flat(solution.vectors)[0], rows[0] / 2) < 1e-12  # as it began
    assert relative(flat(solution.vectors)[1], rows[1]) < 1e-12
    assert solution.residuals[0, 1:].isnan().all()


def test_inner_products_are_summed_in_float64():
    """1 + 10⁸ − 10⁸ is 0 in float32, which would end the solve."""
    signs = torch.tensor([[1.0, 1.0, -1.0]])

    def product(of, into, numbers):
        into["one"].copy_(of["one"] * signs)

    def precondition(of, into):
        is_start = of["one"] is rows["one"] and not calls
        calls.append(of)
        into["one"].copy_(0 * of["one"] if is_start else of["one"])

    rows, calls = {"one": torch.tensor([[[1.0, 1e4, 1e4]]])}, []
    found = conjugate_gradients(product, precondition, rows, iterations=1, tolerance=1e-9)
    assert found.residuals[0, 1].isfinite()
    assert found.vectors["one"].any()


def test_astra_with_the_whole_matrix_reaches_the_dense_solution():
    matrix, rows = positive(8, 1.0), torch.randn(3, SIZE, dtype=torch.float64)
    preconditioner = matrix + torch.diag(torch.rand(SIZE, dtype=torch.float64))
    found = astra(
        Matrix(matrix),
        inverse_of(preconditioner),
        block(rows),
        iterations=90,
        step_size=0.5,
        momentum=0.5,
    )
    assert relative(flat(found.vectors), torch.linalg.solve(matrix, rows.T).T) < 1e-5
    assert found.residuals.shape == (3, 91)
    assert (found.residuals[:, -1] < 1e-4).all()


def test_astras_steps_are_those_of_its_equation():
    samples = [positive(8, 1.0) for _ in range(4)]
    preconditioner, rows = positive(SIZE, 2.0), torch.randn(2, SIZE, dtype=torch.float64)
    inverse = torch.linalg.inv(preconditioner)
    x, m = rows @ inverse, torch.zeros_like(rows)
    for sample in samples[:3]:
        m = 0.9 * m + (x @ sample - rows) @ inverse
        x = x - 0.05 * m
    remaining = iter(samples)

    def product(of, into, numbers):
        Matrix(next(remaining))(of, into, numbers)

    settings = {"iterations": 3, "step_size": 0.05, "momentum": 0.9}
    found = astra(product, inverse_of(preconditioner), block(rows), **settings)
    assert relative(flat(found.vectors), x) < 1e-12
    expected = (x @ samples[3] - rows).norm(dim=1) / rows.norm(dim=1)
    assert relative(found.residuals[:, -1], expected) < 1e-12


def test_a_solve_that_diverges_is_refused():
    matrix, rows = positive(8, 1.0), torch.randn(1, SIZE, dtype=torch.float64)
    identity = torch.eye(SIZE, dtype=torch.float64)
    with pytest.raises(NonFiniteError, match=r"diverged: NaN .* smaller refine.step_size"):
        astra(
            Matrix(matrix),
            inverse_of(identity),
            block(rows),
            iterations=2000,
            step_size=10.0,
            momentum=0.9,
        )
