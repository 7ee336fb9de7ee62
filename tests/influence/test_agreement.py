"""Rank correlation."""

import pytest
import torch

from ekfac_dist.influence.agreement import spearman


def test_spearman():
    values = torch.tensor([3.0, 1.0, 2.0, 9.0])
    assert spearman(values, values.exp()) == pytest.approx(1)
    assert spearman(values, -values) == pytest.approx(-1)
    assert spearman(values, torch.ones(4)) is None
    assert spearman(values[:1], values[:1]) is None
    # By hand: ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4.
    ties = spearman(torch.tensor([0.0, 5.0, 5.0, 6.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert ties == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
