"""Summary statistics of eigenvalue spectra, for `inspect`."""

import torch
from torch import Tensor


def effective_rank(values: Tensor) -> float:
    """Exp of the entropy of the normalised eigenvalues (Roy & Vetterli 2007); 0 for all zeros.

    Args:
        values: Non-negative eigenvalues of any shape.

    Returns:
        From 1 (a single non-zero value) to the number of values (all equal).
    """
    values = values.double().flatten().clamp(min=0)
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values / total
    return torch.exp(-torch.special.xlogy(shares, shares).sum()).item()


def departure(lambda_OI: Tensor, kfac_OI: Tensor) -> float:
    """‖Λ − Λ_K-FAC‖ / ‖Λ‖, Frobenius: how much the eigenvalue correction changed.

    Args:
        lambda_OI: Corrected eigenvalues Λ.
        kfac_OI: Λ of plain K-FAC; see `kronecker.kfac_lambda`.

    Returns:
        0 where both are zero, infinity where only Λ is.
    """
    difference = (lambda_OI - kfac_OI).norm().item()
    size = lambda_OI.norm().item()
    return difference / size if size else (0.0 if difference == 0 else float("inf"))
