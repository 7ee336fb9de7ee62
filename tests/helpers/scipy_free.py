"""A χ² test, by the regularised incomplete gamma function that torch has."""

import numpy as np
import torch


def chi_square_p_value(observed, expected):
    """P(χ² ≥ the statistic) for counts and their expectations of equal totals."""
    observed, expected = np.asarray(observed, float), np.asarray(expected, float)
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = torch.tensor((len(observed) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(degrees, torch.tensor(statistic / 2)).item()
