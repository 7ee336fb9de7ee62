"""Where EK-FAC is exact, and where it must not be: small networks of our own, dense Fishers.

For squared error the expectation over labels is exact: one gradient for each output coordinate.
"""

import itertools

import pytest
import torch
from helpers.dense import relative
from torch import nn

from ekfac_dist.curvature import kronecker
from ekfac_dist.curvature.blocks import rotate_rows
from ekfac_dist.curvature.covariance import add_outer_products_, mirror_
from ekfac_dist.curvature.eigenbasis import decompose
from ekfac_dist.curvature.refit import (
    add_position_squares_,
    add_sequence_squares_,
)

EXACT = 1e-10
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def anisotropic(*shape):
    """Gaussian inputs whose coordinates differ in size and are correlated."""
    mixing = torch.diag(torch.linspace(0.2, 3, shape[-1], dtype=torch.float64))
    mixing += 0.3 * torch.randn(shape[-1], shape[-1], dtype=torch.float64)
    return torch.randn(*shape, dtype=torch.float64) @ mixing


def linear_net(*sizes, activation=None, bias=False):
    layers = []
    for i, o in itertools.pairwise(sizes):
        layers.append(nn.Linear(i, o, bias=bias))
        if activation is not None:
            layers.append(activation())
    if activation is not None:
        layers.pop()
    return nn.Sequential(*layers).double()


def observe(net, layer, x, scalars):
    """Inputs a [T, I] of a layer, and for each scalar of the output its gradient g [T, O].

    Args:
        net: The network.
        layer: The nn.Linear looked at.
        x: One sequence's inputs [T, i].
        scalars: Function from the network's output to a list of scalars, one for each draw of
            labels.
    """
    seen = {}
    handle = layer.register_forward_hook(lambda m, a, o: seen.update(a=a[0].detach(), out=o))
    draws = scalars(net(x))
    handle.remove()
    grads = [torch.autograd.grad(s, seen["out"], retain_graph=True)[0] for s in draws]
    a = seen["a"]
    if layer.bias is not None:
        a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1)
    return a, grads


def every_output(weight=1.0):
    """Squared error's exact expectation: one draw for each output coordinate of each position."""
    return lambda out: list((weight * out).flatten())


class Fit:
    """The package's curvature of one layer, and the dense Fisher, over sequences and draws."""

    def __init__(self, net, layer, sequences, scalars, per_token=False):
        rows = [observe(net, layer, x, scalars) for x in sequences]
        self.N, self.M = len(rows), sum(len(a) for a, _ in rows)
        I, O = rows[0][0].shape[1], rows[0][1][0].shape[1]
        sum_II, sum_OO = torch.zeros(I, I).double(), torch.zeros(O, O).double()
        for a, grads in rows:
            add_outer_products_(sum_II, a, bias=False)
            for g in grads:
                add_outer_products_(sum_OO, g, bias=False)
        basis_A = decompose("A", mirror_(sum_II), self.M, CPU)
        basis_S = decompose("S", mirror_(sum_OO), self.M, CPU)
        self.A, self.S = sum_II / self.M, sum_OO / self.M
        self.QA, self.QS = basis_A.eigenvectors, basis_S.eigenvectors
        lam, gradients = torch.zeros(O, I).double(), []
        for a, grads in rows:
            for g in grads:
                gradients.append((g.T @ a).flatten())
                a_rows = rotate_rows(a, [self.QA])
                g_rows = rotate_rows(g, [self.QS])
                if per_token:
                    add_position_squares_(lam, a_rows, g_rows)
                else:
                    add_sequence_squares_(
                        lam, a_rows, g_rows, [len(a)], basis_II=None, basis_OO=None, bias=False
                    )
        self.lam = lam / self.N
        vectors = torch.stack(gradients)
        self.F = vectors.T @ vectors / self.N
        self.kfac = kronecker.kfac_lambda(basis_S.eigenvalues, basis_A.eigenvalues, self.M, self.N)

    def dense(self, lam):
        Q = torch.kron(self.QS, self.QA)
        return Q @ torch.diag(lam.flatten()) @ Q.T

    @property
    def E(self):
        return self.dense(self.lam)

    @property
    def K(self):
        return self.dense(self.kfac)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_deep_linear_network_with_one_position_is_exact(layer, bias):
    net = linear_net(4, 5, 3, 2, bias=bias)
    fit = Fit(net, net[layer], [anisotropic(1, 4) for _ in range(30)], every_output())
    assert relative(fit.K, fit.F) < EXACT
    assert relative(fit.E, fit.F) < EXACT
    identity = torch.eye(len(fit.F), dtype=torch.float64) * fit.F.trace() / len(fit.F)
    assert relative(identity, fit.F) > 0.5


def test_last_layer_of_a_tanh_network_with_one_position_is_exact():
    net = linear_net(4, 5, 3, activation=nn.Tanh)
    fit = Fit(net, net[2], [anisotropic(1, 4) for _ in range(30)], every_output())
    assert relative(fit.E, fit.F) < EXACT
    assert relative(fit.K, fit.F) < EXACT
    first = Fit(net, net[0], [anisotropic(1, 4) for _ in range(30)], every_output())
    assert relative(first.E, first.F) > 0.01


def test_token_wise_deep_linear_network_is_exact():
    net = linear_net(4, 5, 3)
    fit = Fit(net, net[0], [anisotropic(t, 4) for t in (1, 3, 6, 2)], every_output())
    assert relative(fit.E, fit.F) < EXACT
    assert relative(fit.K, fit.F) < EXACT


def cross_entropy(labels):
    return lambda out: [nn.functional.cross_entropy(out, labels, reduction="sum")]


@pytest.mark.parametrize("positions", [1, 3])
def test_a_single_sequence_is_exact_at_one_position_only(positions):
    net = linear_net(4, 5, 6, activation=nn.Tanh)
    labels = torch.arange(positions)
    fit = Fit(net, net[0], [anisotropic(positions, 4)], cross_entropy(labels))
    if positions == 1:
        assert relative(fit.E, fit.F) < EXACT
    else:
        assert relative(fit.E, fit.F) > 0.02


class Mixing(nn.Module):
    """Position t sees the mean of the positions up to t."""

    def forward(self, x):
        return x.cumsum(0) / torch.arange(1, len(x) + 1, dtype=x.dtype)[:, None]


def test_per_token_equals_per_sequence_only_for_token_wise_networks_in_expectation():
    sequences = [anisotropic(t, 4) for t in (4, 5, 3)]
    token_wise = linear_net(4, 5, 3, activation=nn.Tanh)
    per_sequence, per_token = (
        Fit(token_wise, token_wise[0], sequences, every_output(), per_token=flag)
        for flag in (False, True)
    )
    assert relative(per_token.lam, per_sequence.lam) < EXACT

    def one_draw(out):
        labels = torch.arange(len(out)) % out.shape[1]
        return [nn.functional.cross_entropy(out, labels, reduction="sum")]

    per_sequence, per_token = (
        Fit(token_wise, token_wise[0], sequences, one_draw, per_token=flag)
        for flag in (False, True)
    )
    assert relative(per_token.lam, per_sequence.lam) > 0.05

    mixing = nn.Sequential(*linear_net(4, 5), nn.Tanh(), Mixing(), *linear_net(5, 3)).double()
    per_sequence, per_token = (
        Fit(mixing, mixing[0], sequences, every_output(), per_token=flag) for flag in (False, True)
    )
    assert relative(per_token.lam, per_sequence.lam) > 0.02


def test_rescaled_covariances_leave_the_approximation_unchanged():
    net = linear_net(4, 5, 3, activation=nn.Tanh)
    sequences = [anisotropic(t, 4) for t in (1, 3, 6, 2)]
    fit = Fit(net, net[0], sequences, every_output())
    for scale in (1e-6, 7.0, 1e9):
        QA = decompose("A", fit.A * scale, 1, CPU).eigenvectors
        QS = decompose("S", fit.S / scale, 1, CPU).eigenvectors
        Q = torch.kron(QS, QA)
        lam = torch.diag(Q.T @ fit.F @ Q)
        assert relative(Q @ torch.diag(lam) @ Q.T, fit.E) < EXACT


def test_a_rotation_inside_a_degenerate_eigenspace_changes_nothing_for_a_kronecker_fisher():
    QA, _ = torch.linalg.qr(torch.randn(4, 4).double())
    A = QA @ torch.diag(torch.tensor([1.0, 2.0, 2.0, 5.0]).double()) @ QA.T
    S = anisotropic(3, 3)
    S = S @ S.T
    QS = decompose("S", S, 1, CPU).eigenvectors
    F = torch.kron(S, A)
    turn = torch.eye(4).double()
    turn[1:3, 1:3] = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    for basis in (QA, QA @ turn, decompose("A", A, 1, CPU).eigenvectors):
        Q = torch.kron(QS.contiguous(), basis.contiguous())
        E = Q @ torch.diag(torch.diag(Q.T @ F @ Q)) @ Q.T
        assert relative(E, F) < EXACT


@pytest.mark.parametrize("layer", [0, 2])
def test_the_fisher_block_of_a_relu_network_is_the_hessian_block(layer):
    net = linear_net(4, 5, 3, activation=nn.ReLU)
    sequences = [anisotropic(2, 4) for _ in range(5)]
    fit = Fit(net, net[layer], sequences, every_output())

    def mean_loss(weight):
        parameters = {f"{layer}.weight": weight}
        outputs = [torch.func.functional_call(net, parameters, (x,)) for x in sequences]
        return sum(0.5 * (out - 1.0).square().sum() for out in outputs) / len(sequences)

    hessian = torch.autograd.functional.hessian(mean_loss, net[layer].weight.detach())
    assert relative(fit.F, hessian.reshape(fit.F.shape)) < EXACT
    # Λ is the Hessian's diagonal in the eigenbasis, so E comes nearer to it than K-FAC does.
    Q = torch.kron(fit.QS, fit.QA)
    assert relative(fit.lam.flatten(), torch.diag(Q.T @ hessian.reshape(fit.F.shape) @ Q)) < EXACT
    assert relative(fit.E, fit.F) <= relative(fit.K, fit.F) + EXACT
    assert relative(fit.K, fit.F) > 0.05 or layer == 2  # the last layer is exact anyway


@pytest.mark.parametrize("lengths", [[3, 1, 5], [1] * 9, [1, 0, 8], [1, 0] * 9])
@pytest.mark.parametrize("bias", [False, True])
def test_every_order_of_rotation_gives_the_same_squares(bias, lengths):
    a, g = anisotropic(9, 4), anisotropic(9, 6)
    I = 4 + bias
    QA, _ = torch.linalg.qr(torch.randn(I, I).double())
    QS, _ = torch.linalg.qr(torch.randn(6, 6).double())
    full = torch.cat([a, torch.ones(9, 1).double()], 1) if bias else a
    expected, start = torch.zeros(6, I).double(), 0
    for length in lengths:
        G = g[start : start + length].T @ full[start : start + length]
        expected += (QS.T @ G @ QA) ** 2
        start += length
    for rows_first_A in (True, False):
        for rows_first_S in (True, False):
            found = torch.zeros(6, I).double()
            add_sequence_squares_(
                found,
                rotate_rows(a, [QA], bias=bias) if rows_first_A else a,
                rotate_rows(g, [QS]) if rows_first_S else g,
                lengths,
                basis_II=None if rows_first_A else [QA],
                basis_OO=None if rows_first_S else [QS],
                bias=bias,
            )
            assert relative(found, expected) < 1e-13
