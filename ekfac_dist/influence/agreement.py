"""How well the scores of a scan with low-rank query gradients agree with exact scores."""

import torch
from torch import Tensor


def spearman(one_n: Tensor, other_n: Tensor) -> float | None:
    """Spearman's rank correlation of two vectors [n]; equal values share their mean rank.

    None if it is undefined, which it is where all values of a vector are equal.
    """
    one_ranks_n, other_ranks_n = _centred_ranks(one_n), _centred_ranks(other_n)
    scale = one_ranks_n.norm() * other_ranks_n.norm()
    return None if scale == 0 else float((one_ranks_n @ other_ranks_n / scale).clamp(-1, 1))


def _centred_ranks(values_n: Tensor) -> Tensor:
    _, distinct_n, counts = torch.unique(values_n, return_inverse=True, return_counts=True)
    ranks_n = (counts.cumsum(0) - (counts - 1) / 2)[distinct_n].double()
    return ranks_n - ranks_n.mean()
