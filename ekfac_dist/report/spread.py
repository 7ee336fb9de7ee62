"""Statistics for the report: how scores are spread over sequences, and a score over its tokens.

Pure functions of arrays; knows no files and no page.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CARRIED = 0.9  # share of Σ|token score| that counts as nearly all of a score
TAILS = (0.001, 0.01, 0.1)  # fractions of the scored sequences
NUM_BINS = 60  # of the histogram
CURVE_POINTS = 80  # of each curve of score by rank


@dataclass(frozen=True)
class Tail:
    """How much of the influence the strongest sequences hold.

    Attributes:
        fraction: Fraction of the scored sequences.
        count: The number of sequences that this is, rounded up.
        positive: Share of the sum of all positive scores that the `count` highest scores hold; None
            if no score is positive.
        negative: The same for the negative scores and the `count` lowest.
    """

    fraction: float
    count: int
    positive: float | None
    negative: float | None


@dataclass(frozen=True)
class Distribution:
    """How one query's scores are spread over all scored sequences.

    Attributes:
        number: Number of scores.
        num_positive: Number of positive scores.
        num_negative: Number of negative scores.
        mean: Mean of all scores.
        median: Their median.
        deviation: Their standard deviation.
        least: The lowest score.
        most: The highest score.
        first_edge: Left edge of the histogram's first bin. Zero is an edge of a bin, unless all
            scores are equal.
        bin_width: Width of each bin.
        counts: Number of scores in each bin.
        tails: One tail for each fraction of `TAILS`.
        positive_curve: (rank, score) of positive scores, highest first, at ranks evenly spaced on a
            logarithmic axis.
        negative_curve: (rank, -score) of negative scores, lowest first.
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
    """The distribution of one query's scores.

    Args:
        scores_N: Scores of N > 0 sequences, all finite.
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
    """The fewest tokens whose |score| together make up a share of Σ|score|.

    Args:
        token_scores_T: A sequence's token scores, one for each position.
        share: The share, between 0 and 1.

    Returns:
        The number of tokens; 0 if every score is 0.
    """
    sums = np.sort(np.abs(token_scores_T.astype(np.float64)))[::-1].cumsum()
    if not len(sums) or not sums[-1]:
        return 0
    return int((sums < share * sums[-1]).sum()) + 1


def _tail(fraction: float, number: int, positive: Tensor, negative: Tensor) -> Tail:
    count = math.ceil(fraction * number)
    shares = [
        float(sizes[:count].sum() / sizes.sum()) if len(sizes) else None
        for sizes in (positive, negative)
    ]
    return Tail(fraction, count, *shares)


def _curve(ordered: Tensor) -> list[tuple[int, float]]:
    ranks = np.unique(np.geomspace(1, max(1, len(ordered)), CURVE_POINTS).round().astype(int))
    return [(int(rank), float(ordered[rank - 1])) for rank in ranks[: len(ordered)]]
