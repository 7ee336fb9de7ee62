import pytest
import torch

from ekfac_dist.curvature import eigenbasis
from ekfac_dist.curvature.eigenbasis import MAX_CPU_SIZE, check_size, decompose, header_of
from ekfac_dist.errors import DecompositionError, NonFiniteError

CPU = torch.device("cpu")


def assert_valid(basis, matrix, tolerance=1e-12):
    n = len(matrix)
    Q, values = basis.eigenvectors, basis.eigenvalues
    scale = matrix.abs().max().clamp(min=1e-300)
    assert (Q.T @ Q - torch.eye(n).double()).abs().max() < tolerance
    assert ((Q * values) @ Q.T - matrix).abs().max() < tolerance * n * scale
    assert (values.diff() >= 0).all()
    assert (values >= 0).all()
    assert Q.dtype == values.dtype == torch.float64


def covariance(n, rank=None):
    torch.manual_seed(n)
    rows = torch.randn(rank or 2 * n, n).double() * torch.linspace(0.1, 3, n)
    return rows.T @ rows


CASES = {
    "ordinary": covariance(7),
    "zeros": torch.zeros(6, 6).double(),
    "rank one": covariance(6, rank=1),
    "one enormous outlier": covariance(6)
    + torch.diag(torch.tensor([0, 0, 1e30, 0, 0, 0])).double(),
    "one by one": torch.tensor([[3.0]]).double(),
    "one by one, zero": torch.zeros(1, 1).double(),
    "tiny": covariance(6) * 1e-200,
    "huge": covariance(6) * 1e200,
    "identity": torch.eye(5).double(),
    "larger": covariance(150, rank=20),
}


@pytest.mark.parametrize("case", CASES)
def test_the_basis_is_orthogonal_and_rebuilds_the_matrix(case):
    matrix = CASES[case]
    basis = decompose("f", matrix * 4, 4, CPU)
    assert_valid(basis, matrix)
    assert max(basis.residual, basis.orthogonality, basis.trace_error) < 1e-12
    assert set(header_of([basis.checks])) == {
        "residual",
        "orthogonality",
        "trace_error",
        "attempts",
        "probes",
    }


def test_float32_sums_are_decomposed_in_float64():
    matrix = covariance(40).float()
    assert_valid(decompose("f", matrix, 1, CPU), matrix.double())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_is_refused_by_name(value):
    matrix = covariance(5)
    matrix[1, 2] = matrix[2, 1] = value
    with pytest.raises(NonFiniteError, match=r"model\.x\.input"):
        decompose("model.x.input", matrix, 1, CPU)


@pytest.mark.parametrize("failures", [1, 2])
def test_a_decomposition_that_fails_is_tried_again(monkeypatch, failures):
    calls = fail(monkeypatch, failures)
    matrix = covariance(6)
    basis = decompose("f", matrix, 1, CPU)
    assert_valid(basis, matrix)
    assert basis.attempts == len(calls) == failures + 1


def test_a_decomposition_that_always_fails_is_an_error_that_names_the_factor(monkeypatch):
    calls = fail(monkeypatch, 99)
    with pytest.raises(DecompositionError, match=r"mlp\.up\.output.*did not converge"):
        decompose("mlp.up.output", covariance(6), 1, CPU)
    assert len(calls) == 3


@pytest.mark.parametrize(("first", "last"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_the_last_attempt_is_on_another_device(monkeypatch, first, last):
    asked = []

    def fails(matrix, scale, device, backwards):
        asked.append((device.type, backwards))
        raise RuntimeError("failed")

    monkeypatch.setattr(eigenbasis, "_attempt", fails)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(DecompositionError, match=f"on {first}: failed; on {first}: .* on {last}: "):
        decompose("f", covariance(4), 1, torch.device(first))
    assert asked == [(first, False), (first, True), (last, False)]


def test_a_sum_goes_to_its_device_as_it_is_and_is_symmetrised_there(monkeypatch):
    sent, to = [], torch.Tensor.to

    def noted(tensor, *target, **more):
        if target and target[0] == torch.device("cuda"):
            sent.append((tensor.dtype, tensor.shape))
            return tensor
        return to(tensor, *target, **more)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    upper = covariance(6).float()
    upper[1, 0] += 1e-3  # not symmetric
    basis = decompose("f", upper, 1, torch.device("cuda"))
    assert sent == [(torch.float32, (6, 6))]  # half the bytes of float64
    assert_valid(basis, (upper.double() + upper.double().T) / 2)


def test_a_wrong_result_is_found_and_tried_again(monkeypatch):
    right = torch.linalg.eigh
    calls = []

    def wrong_once(matrix):
        calls.append(1)
        values, vectors = right(matrix)
        return (values, vectors.roll(1, 1)) if len(calls) == 1 else (values, vectors)

    monkeypatch.setattr(torch.linalg, "eigh", wrong_once)
    matrix = covariance(6)
    basis = decompose("f", matrix, 1, CPU)
    assert basis.attempts == 2
    assert_valid(basis, matrix)


DAMAGES = {
    "a column turned by 1e-6": lambda Q, j, k: Q[:, j].add_(1e-6 * Q[:, k]),
    "a column too long by 1e-7": lambda Q, j, k: Q[:, j].mul_(1 + 1e-7),
    "two columns exchanged": lambda Q, j, k: Q.index_copy_(1, torch.tensor([j, k]), Q[:, [k, j]]),
    "a column of another basis": lambda Q, j, k: Q[:, j].copy_(torch.randn(len(Q)).double()),
    "a single wrong element": lambda Q, j, k: Q[k, j].add_(1e-7),
}


def assert_every_damage_is_seen(n, trials):
    """One bad column among n is over the tolerance, in every trial, for every kind of damage."""
    matrix = covariance(n)
    matrix /= matrix.abs().max()
    values, vectors = torch.linalg.eigh(matrix)
    assert max(eigenbasis._check(matrix, values, vectors)) < 1e-12
    torch.manual_seed(0)
    for trial in range(trials):
        j, k = torch.randperm(n)[:2].tolist()
        kept = vectors[:, [j, k]].clone()
        damage = list(DAMAGES)[trial % len(DAMAGES)]
        DAMAGES[damage](vectors, j, k)
        assert max(eigenbasis._check(matrix, values, vectors)) > eigenbasis.TOLERANCE, damage
        vectors[:, [j, k]] = kept


def test_one_bad_column_is_always_seen():
    assert_every_damage_is_seen(96, trials=300)


@pytest.mark.slow
def test_one_bad_column_is_always_seen_among_2048():
    assert_every_damage_is_seen(2048, trials=1000)


def test_checks_leave_the_random_numbers_of_the_caller_alone():
    matrix = covariance(20)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    decompose("f", matrix, 1, CPU)
    assert torch.equal(torch.rand(4), expected)


def test_the_probed_residual_is_that_of_the_whole_matrix():
    matrix = covariance(60)
    values, vectors = torch.linalg.eigh(matrix)
    vectors += 1e-5 * torch.randn(60, 60)
    error = (vectors * values) @ vectors.T - matrix
    residual, deviation, _ = eigenbasis._check(matrix, values, vectors)
    assert 0.8 < residual * matrix.norm() / error.norm() < 2
    rows = (vectors.T @ vectors - torch.eye(60)).norm(dim=1)
    assert 1 < deviation / rows.mean() < 5


def test_a_result_full_of_nan_is_never_accepted(monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (m.diagonal() * torch.nan, m * torch.nan))
    with pytest.raises(DecompositionError, match="residual inf"):
        decompose("f", covariance(4), 1, CPU)


def test_a_factor_too_large_for_a_cpu_is_refused_before_it_is_touched():
    check_size("f", MAX_CPU_SIZE, CPU)
    check_size("f", MAX_CPU_SIZE + 1, torch.device("cuda"))
    with pytest.raises(DecompositionError, match="n = 32767"):
        check_size("f", 32_767, CPU)
    with pytest.raises(DecompositionError, match="n = 40000"):
        decompose("f", torch.empty(1).expand(40_000, 40_000), 1, CPU)


def fail(monkeypatch, times):
    right, calls = torch.linalg.eigh, []

    def eigh(matrix):
        calls.append(1)
        if len(calls) <= times:
            raise torch.linalg.LinAlgError("linalg.eigh: the algorithm did not converge")
        return right(matrix)

    monkeypatch.setattr(eigenbasis.torch.linalg, "eigh", eigh)
    return calls
