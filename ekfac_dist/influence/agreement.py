"""How well the scores of a low-rank scan agree with exact ones."""

import torch
from torch import Tensor


def spearman(one_n: Tensor, other_n: Tensor) -> float | None:
    """Rank correlation of two vectors, equal values sharing their mean rank; None if undefined."""
    one, other = (_centred_ranks(values) for values in (one_n, other_n))
    scale = one.norm() * other.norm()
    return None if scale == 0 else float((one @ other / scale).clamp(-1, 1))


def _centred_ranks(values_n: Tensor) -> Tensor:
    _, which, counts = torch.unique(values_n, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[which].double()
    return ranks - ranks.mean()
