"""One linear layer, squared error: influence is a derivative that has a closed form."""

import torch
from helpers.dense import relative

from ekfac_dist.curvature import kronecker
from ekfac_dist.curvature.eigenbasis import decompose


def test_influence_is_the_derivative_of_the_ridge_solution():
    """log p = −½‖W x − y‖². S = I and Λ = λ_Aᵀ, so E is the exact Gauss–Newton matrix I ⊗ A.

    The ridge solution minimises Σ_n w_n ½‖W x_n − y_n‖² + λ/2 ‖W‖², with w_n = 1/N. Its derivative
    by w_k, seen by the log-probability of a query, is the influence of k on that query.
    """
    generator = torch.Generator().manual_seed(0)
    N, I, O, lam = 9, 5, 3, 0.2

    def randn(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    X = randn(N, I) * torch.linspace(0.2, 3, I)  # anisotropic
    Y, x_query, y_query = randn(N, O), randn(I), randn(O)

    def ridge(weights):
        A = (X.T * weights) @ X + lam * torch.eye(I, dtype=torch.float64)
        return torch.linalg.solve(A, (X.T * weights) @ Y).T

    def log_p_of_query(weights):
        return -0.5 * (ridge(weights) @ x_query - y_query).square().sum()

    weights = torch.full((N,), 1 / N, dtype=torch.float64)
    derivative = torch.func.grad(log_p_of_query)(weights)

    W = ridge(weights)
    basis = decompose("a.input", X.T @ X, N, torch.device("cpu"))
    values_I, basis_II = basis.eigenvalues, basis.eigenvectors
    values_O, basis_OO = torch.ones(O, dtype=torch.float64), torch.eye(O, dtype=torch.float64)
    damped = kronecker.damped(kronecker.kfac_lambda(values_O, values_I, N, N), lam)

    def gradient(x, y):
        return -torch.outer(W @ x - y, x)  # of log p

    step = kronecker.solve(gradient(x_query, y_query), [basis_OO], [basis_II], damped)
    influence = torch.stack([(step * gradient(x, y)).sum() for x, y in zip(X, Y, strict=True)])
    assert relative(influence, derivative) < 1e-10
    identity = torch.stack(
        [(gradient(x_query, y_query) * gradient(x, y)).sum() for x, y in zip(X, Y, strict=True)]
    )
    scaled = identity * (identity @ derivative) / (identity @ identity)
    assert relative(scaled, derivative) > 0.1
