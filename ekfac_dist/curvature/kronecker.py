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
    """Λ of plain K-FAC, M/N · λ_S λ_Aᵀ, in the same scale as corrected eigenvalues.

    Args:
        values_O: λ_S [O], eigenvalues of the output factor.
        values_I: λ_A [I], eigenvalues of the input factor.
        num_positions: M, the number of counted positions.
        num_sequences: N, the number of sequences.

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
    """E V = Q_S [Λ ∘ (Q_Sᵀ V Q_A)] Q_Aᵀ.

    Args:
        matrix_OI: V [..., O, I], weight-shaped.
        basis_OO: The blocks of Q_S, eigenvectors in columns.
        basis_II: The blocks of Q_A, eigenvectors in columns.
        lambda_OI: Λ [O, I].

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
        damped_OI: Λ + λ [O, I], from `damped`.

    Returns:
        [..., O, I].
    """
    return rotate_back(rotate(matrix_OI, basis_OO, basis_II) / damped_OI, basis_OO, basis_II)


def damped(lambda_OI: Tensor, damping: float) -> Tensor:
    """Λ + λ, checked to be invertible.

    Args:
        lambda_OI: Λ [O, I].
        damping: λ, absolute, 0 or more.

    Returns:
        [O, I], a new tensor.

    Raises:
        ConfigError: If λ is 0 and an entry of Λ is 0 to rounding, so that there is no inverse; or
            if Λ's dtype cannot hold λ.
    """
    if not damping <= torch.finfo(lambda_OI.dtype).max:
        raise ConfigError(
            f"damping is {damping:g}, above what the factors' dtype can hold; give a smaller one."
        )
    damped_OI = lambda_OI + damping
    # Λ sums squares of rotated gradients; their own rounding errors enter it squared.
    rounding = 0.0 if damping else torch.finfo(lambda_OI.dtype).eps * max(lambda_OI.shape)
    lowest, highest = torch.aminmax(damped_OI)  # NaN if any is
    if not bool(lowest > rounding**2 * highest):
        raise ConfigError(
            f"damping is {damping:g} and Λ has zeros, so there is no inverse; give a damping "
            "above 0."
        )
    return damped_OI
