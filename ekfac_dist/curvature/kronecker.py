"""The approximate Fisher E = (Q_S ⊗ Q_A) diag(vec Λ) (Q_S ⊗ Q_A)ᵀ, applied and inverted."""

import torch
from torch import Tensor

from ekfac_dist.curvature.blocks import (
    Blocks,
    rotate_columns,
    rotate_columns_back,
    rotate_rows,
    rotate_rows_back,
)
from ekfac_dist.errors import ConfigError


def kfac_lambda(
    values_O: Tensor, values_I: Tensor, num_positions: int, num_sequences: int
) -> Tensor:
    """Λ of plain K-FAC, M/N · λ_S λ_Aᵀ, in the scale of the refitted one.

    Args:
        values_O: λ_S [O].
        values_I: λ_A [I].
        num_positions: M, positions counted.
        num_sequences: N, sequences.

    Returns:
        [O, I], in the arguments' dtype.
    """
    return torch.outer(values_O, values_I) * (num_positions / num_sequences)


def rotate(matrix_OI: Tensor, basis_OO: Blocks, basis_II: Blocks) -> Tensor:
    """Q_Sᵀ V Q_A, shape [..., O, I]."""
    return rotate_rows(rotate_columns(matrix_OI, basis_OO), basis_II)


def rotate_back(matrix_OI: Tensor, basis_OO: Blocks, basis_II: Blocks) -> Tensor:
    """Q_S V Q_Aᵀ, shape [..., O, I]."""
    return rotate_rows_back(rotate_columns_back(matrix_OI, basis_OO), basis_II)


def apply(matrix_OI: Tensor, basis_OO: Blocks, basis_II: Blocks, lambda_OI: Tensor) -> Tensor:
    """E V.

    Args:
        matrix_OI: V [..., O, I], weight-shaped.
        basis_OO: The blocks of Q_S, eigenvectors in columns.
        basis_II: The blocks of Q_A, eigenvectors in columns.
        lambda_OI: Λ.

    Returns:
        [..., O, I].
    """
    return rotate_back(lambda_OI * rotate(matrix_OI, basis_OO, basis_II), basis_OO, basis_II)


def solve(matrix_OI: Tensor, basis_OO: Blocks, basis_II: Blocks, damped_OI: Tensor) -> Tensor:
    """(E + λ)⁻¹ V = Q_S [(Q_Sᵀ V Q_A) ⊘ (Λ + λ)] Q_Aᵀ (Grosse et al. 2023, eq. 21).

    Args:
        matrix_OI: V [..., O, I], weight-shaped.
        basis_OO: The blocks of Q_S, eigenvectors in columns.
        basis_II: The blocks of Q_A, eigenvectors in columns.
        damped_OI: Λ + λ, from `damped`; not changed.

    Returns:
        [..., O, I].
    """
    return rotate_back(rotate(matrix_OI, basis_OO, basis_II) / damped_OI, basis_OO, basis_II)


def damped(lambda_OI: Tensor, damping: float) -> Tensor:
    """Λ + λ, which can be divided by.

    Args:
        lambda_OI: Λ; not changed.
        damping: λ, absolute, 0 or more.

    Raises:
        ConfigError: There is no damping, and Λ is zero somewhere, be it but for rounding: there is
            no inverse.
    """
    damped_OI = lambda_OI + damping
    # Λ sums squares of rotated gradients, each as exact as rounding lets it be.
    rounding = 0.0 if damping else torch.finfo(lambda_OI.dtype).eps * max(lambda_OI.shape)
    if not bool((damped_OI > rounding**2 * damped_OI.max()).all()):
        raise ConfigError(
            f"damping is {damping:g} and Λ has zeros, so there is no inverse; give a damping "
            "above 0."
        )
    return damped_OI
