"""How scores are spread over sequences, and one score over its tokens: numbers for the report.

Pure functions of arrays; knows no files and no page.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CARRIED = 0.9  # of Σ|token score|: the part that is "nearly all of a score"
TAILS = (0.001, 0.01, 0.1)
NUM_BINS = 60
CURVE_POINTS = 80


@dataclass(frozen=True)
class Tail:
    """How much of the influence the strongest sequences hold.

    Attributes:
        fraction: Of the scored sequences.
        count: That many sequences, rounded up.
        positive: The share of the sum of all positive scores that the `count` highest hold; None
            without a positive score.
        negative: The same of the negative ones.
    """

    fraction: float
    count: int
    positive: float | None
    negative: float | None


@dataclass(frozen=True)
class Distribution:
    """How one query's scores are spread over all scored sequences.

    Attributes:
        number: Of scores; `num_positive` and `num_negative` of them have a sign.
        mean: Of all scores, like `median`, `deviation` (the standard one), `least` and `most`.
        first_edge: Of the histogram's first bin. Zero is an edge, unless all scores are equal.
        bin_width: Of each of its bins.
        counts: Of scores in each bin.
        tails: For each fraction of `TAILS`.
        positive_curve: (rank, score) of the positive scores, highest first, at ranks that are even
            on a logarithmic axis.
        negative_curve: (rank, -score) of the negative ones, lowest first.
    """

    number: int
    num_positive: int
    num_negative: int
    mean: float
    median: float
    deviation: float
    least: float
    most: float
    first_edge: float
    bin_width: float
    counts: list[int]
    tails: list[Tail]
    positive_curve: list[tuple[int, float]]
    negative_curve: list[tuple[int, float]]


def distribution(scores_N: Tensor) -> Distribution:
    """How scores are spread.

    Args:
        scores_N: Scores [N], finite, N > 0.
    """
    ordered = scores_N.double().sort(descending=True).values
    number = len(ordered)
    positive, negative = ordered[ordered > 0], -ordered[ordered < 0].flip(0)
    most, least = float(ordered[0]), float(ordered[-1])
    # Edges at whole multiples of the width, so that no bin holds both signs.
    width = (most - least) / (NUM_BINS - 2) or abs(most) or 1.0
    first = math.floor(least / width)
    bins = (ordered / width).floor().long() - first
    return Distribution(
        number=number,
        num_positive=len(positive),
        num_negative=len(negative),
        mean=float(ordered.mean()),
        median=float(ordered[(number - 1) // 2] + ordered[number // 2]) / 2,
        deviation=float(ordered.std(correction=0)),
        least=least,
        most=most,
        first_edge=first * width,
        bin_width=width,
        counts=torch.bincount(bins).tolist(),
        tails=[_tail(fraction, number, positive, negative) for fraction in TAILS],
        positive_curve=_curve(positive),
        negative_curve=_curve(negative),
    )


def carriers(token_scores_T: np.ndarray, share: float = CARRIED) -> int:
    """The fewest tokens whose |score| make up a share of Σ|score|; 0 if every score is 0.

    Args:
        token_scores_T: A sequence's scores [T], one for each position.
        share: Between 0 and 1.
    """
    sums = np.sort(np.abs(token_scores_T.astype(np.float64)))[::-1].cumsum()
    if not len(sums) or not sums[-1]:
        return 0
    return int((sums < share * sums[-1]).sum()) + 1


def _tail(fraction: float, number: int, positive: Tensor, negative: Tensor) -> Tail:
    count = math.ceil(fraction * number)
    shares = [float(x[:count].sum() / x.sum()) if len(x) else None for x in (positive, negative)]
    return Tail(fraction, count, *shares)


def _curve(ordered: Tensor) -> list[tuple[int, float]]:
    ranks = np.unique(np.geomspace(1, max(1, len(ordered)), CURVE_POINTS).round().astype(int))
    return [(int(rank), float(ordered[rank - 1])) for rank in ranks[: len(ordered)]]
