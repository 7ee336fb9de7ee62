"""Rank correlations, ranks and bootstrap intervals: arrays in, numbers out.

The linear datamodeling score (Park et al. 2023, eq. 5) of a query is the Spearman correlation, over
subsets s of the training data, of Σ_{z ∈ s} score(q, z) with −loss of q after training on s.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its bootstrap interval.

    Attributes:
        mean: The mean.
        low: Lower end of the 95 % percentile interval.
        high: Its upper end.
    """

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """As it is written into results."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


def predictions(scores_QN: np.ndarray, subsets_SN: np.ndarray) -> np.ndarray:
    """Σ over the kept sequences of their scores [S, Q], float64."""
    return subsets_SN.astype(np.float64) @ scores_QN.astype(np.float64).T


def spearman(one_SQ: np.ndarray, two_SQ: np.ndarray) -> np.ndarray:
    """Rank correlation over the first axis, of each column [Q]; 0 where one side is constant.

    Ties have their mean rank.
    """
    ranks = [rankdata(values, axis=0) for values in (one_SQ, two_SQ)]
    centred = [each - each.mean(0) for each in ranks]
    product = (centred[0] * centred[1]).sum(0)
    scale = np.sqrt((centred[0] ** 2).sum(0) * (centred[1] ** 2).sum(0))
    return np.divide(product, scale, out=np.zeros_like(product), where=scale > 0)


def resampled(
    statistic: Callable[[np.ndarray], np.ndarray],
    num_subsets: int,
    num_queries: int,
    times: int,
    seed: int,
) -> np.ndarray:
    """A statistic of each query, averaged over resampled queries, for resampled subsets [times].

    Args:
        statistic: From indices of subsets, with repetitions [S], the value of each query [Q].
        num_subsets: S.
        num_queries: Q.
        times: Number of resamples.
        seed: Seed of the resamples: equal seeds resample alike, so differences can be taken.
    """
    generator = np.random.default_rng([seed, 2])
    means = np.empty(times)
    for k in range(times):
        subsets = generator.integers(num_subsets, size=num_subsets)
        queries = generator.integers(num_queries, size=num_queries)
        means[k] = statistic(subsets)[queries].mean()
    return means


def interval(samples: np.ndarray, mean: float) -> Estimate:
    """A mean with the percentile interval of its resamples."""
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(mean), float(low), float(high))


def mean_of_queries(values_Q: np.ndarray, times: int, seed: int) -> Estimate:
    """The mean over queries, with an interval over resampled queries."""
    generator = np.random.default_rng([seed, 3])
    picks = generator.integers(len(values_Q), size=(times, len(values_Q)))
    return interval(values_Q[picks].mean(1), float(values_Q.mean()))


def gold_ranks(scores_QN: np.ndarray, gold: list[list[int]]) -> np.ndarray:
    """Rank, from 1, of the first gold sequence of each query [Q]; ties count against it.

    Args:
        scores_QN: Scores.
        gold: For each query the columns of the sequences that say it.
    """
    ranks = np.empty(len(gold))
    for query, columns in enumerate(gold):
        best = scores_QN[query, columns].max()
        others = np.delete(scores_QN[query], columns)
        ranks[query] = 1 + (others >= best).sum()
    return ranks
