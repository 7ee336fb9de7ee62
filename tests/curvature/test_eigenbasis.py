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
