import pytest
import torch
from helpers.dense import relative

from ekfac_dist.curvature import kronecker
from ekfac_dist.curvature.damping import Damping, scale_of
from ekfac_dist.curvature.spectrum import departure, effective_rank
from ekfac_dist.errors import ConfigError


@pytest.fixture
def parts():
    torch.manual_seed(0)
    QA, _ = torch.linalg.qr(torch.randn(5, 5).double())
    QS, _ = torch.linalg.qr(torch.randn(4, 4).double())
    lam = torch.rand(4, 5).double() ** 4 * 10
    return QS, QA, lam


def test_solve_equals_the_dense_damped_solve(parts):
    QS, QA, lam = parts
    Q = torch.kron(QS, QA)
    E = Q @ torch.diag(lam.flatten()) @ Q.T
    V = torch.randn(3, 4, 5).double()
    damping = 0.1 * lam.mean().item()
    damped = E + damping * torch.eye(20).double()
    dense = torch.linalg.solve(damped, V.reshape(3, 20).T).T.reshape(3, 4, 5)
    found = kronecker.solve(V, [QS], [QA], kronecker.damped(lam, damping))
    assert relative(found, dense) < 1e-10
    # Rows for columns, the mistake that isotropic inputs cannot show.
    assert relative(kronecker.solve(V, [QS.T], [QA.T], kronecker.damped(lam, damping)), dense) > 0.1
    assert relative(V / (lam.mean() + damping), dense) > 0.1


def test_apply_undoes_solve(parts):
    QS, QA, lam = parts
    V = torch.randn(4, 5).double()
    solved = kronecker.solve(V, [QS], [QA], kronecker.damped(lam, 0.3))
    assert relative(kronecker.apply(solved, [QS], [QA], lam) + 0.3 * solved, V) < 1e-10


def test_no_damping_where_lambda_has_zeros_is_refused(parts):
    _, _, lam = parts
    before = lam.clone()
    with pytest.raises(ConfigError, match="zeros"):
        kronecker.damped(lam * 0, 0.0)
    assert torch.equal(lam, before)


def test_a_damping_that_the_dtype_cannot_hold_is_refused(parts):
    lam = parts[2].float()
    for damping in (1e300, float("inf")):
        with pytest.raises(ConfigError, match="can hold; give a smaller one"):
            kronecker.damped(lam, damping)
    assert torch.isfinite(kronecker.damped(lam, 1e38)).all()


def test_effective_rank_counts_directions():
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([0.0, 3.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(4)) == 0
    assert 1 < effective_rank(torch.tensor([5.0, 1.0])) < 2


def test_departure_is_relative_to_lambda():
    lam = torch.tensor([[3.0, 4.0]])
    assert departure(lam, lam) == 0
    assert departure(lam, lam * 0) == pytest.approx(1)
    assert departure(lam * 0, lam * 0) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_but_for_rounding_are_zeros(dtype):
    """A rank-one Λ has such entries; without damping their inverse would be noise."""
    basis, _ = torch.linalg.qr(torch.randn(6, 6, dtype=dtype))
    gradient = torch.outer(basis[:, 0], basis[:, 1])
    lambda_OI = kronecker.rotate(gradient, [basis], [basis]).square()
    assert (lambda_OI > 0).sum() > 1
    with pytest.raises(ConfigError, match="Λ has zeros"):
        kronecker.damped(lambda_OI, 0.0)
    assert torch.equal(kronecker.damped(lambda_OI, 1e-20), lambda_OI + 1e-20)
    assert torch.equal(kronecker.damped(torch.ones(2, 3) * 1e-9, 0.0), torch.ones(2, 3) * 1e-9)


# -- damping ---------------------------------------------------------------------------------------


def test_scales_of_damping_are_means_of_what_they_say():
    lam = torch.linspace(1, 7, 1000, dtype=torch.float64)[torch.randperm(1000)].view(20, 50)
    lam[3, 7] = 1e9  # a massive activation
    largest = lam.flatten().sort().values
    assert scale_of(lam, "mean") == pytest.approx(lam.mean().item())
    assert scale_of(lam, "trimmed") == pytest.approx(largest[:990].mean().item())
    assert scale_of(lam, "geometric") == pytest.approx(largest.log().mean().exp().item())
    assert scale_of(lam, "mean") > 1e5
    assert max(scale_of(lam, "trimmed"), scale_of(lam, "geometric")) < 8


def test_a_geometric_mean_passes_over_zeros():
    assert scale_of(torch.tensor([[0.0, 4.0], [9.0, 0.0]]), "geometric") == pytest.approx(6)
    assert scale_of(torch.zeros(2, 2), "geometric") == 0


def test_damping_multiplies_its_scale():
    lam = torch.tensor([[1.0, 4.0], [16.0, 64.0]])
    assert Damping(0.5, scale="geometric").absolute("any", lam) == pytest.approx(4)
    assert Damping(0.5).absolute("any", lam) == pytest.approx(85 / 8)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"scale": "median"}, "damping.scale is 'median'.*geometric"),
        ({"scale": "trimmed", "relative": False}, "damping.scale is trimmed, but damping.relative"),
    ],
)
def test_a_scale_that_cannot_be_meant_is_refused(arguments, says):
    with pytest.raises(ConfigError, match=says):
        Damping(0.1, **arguments)
