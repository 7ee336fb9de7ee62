"""What is measured: LDS, removal, tail patch and recall, of every row of the table.

Losses of query groups are −log p; what is predicted is log p. With several seeds each has its own
model, scores and bank, and a query's value is the mean over seeds; intervals are over queries, for
LDS over subsets too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ekfac_dist.evaluate import measures
from ekfac_dist.evaluate.measures import Estimate
from ekfac_dist.evaluate.methods import Row


@dataclass(frozen=True)
class Lds:
    """The linear datamodeling scores of all rows, and their ceiling.

    Attributes:
        subsets_SN: Whether each sequence is kept, bool [subsets, N].
        losses: For each seed the losses of query groups after training on each subset [S, Q].
        by_row: By a row's key, for each seed the rows' predictions [S, Q].
        times: Number of resamples of an interval.
    """

    subsets_SN: np.ndarray
    losses: Sequence[np.ndarray]
    times: int
    by_row: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, row: Row, scores: Sequence[np.ndarray]) -> None:
        """Adds a row.

        Args:
            row: The row.
            scores: Its scores of each seed [Q, N].
        """
        self.by_row[row.key] = [measures.predictions(each, self.subsets_SN) for each in scores]

    def by_query(self, key: str) -> np.ndarray:
        """A row's LDS of each query group, the mean over seeds [Q]."""
        return self._of(key, np.arange(len(self.subsets_SN)))

    def _of(self, key: str, subsets: np.ndarray) -> np.ndarray:
        pairs = zip(self.by_row[key], self.losses, strict=True)
        return np.mean([measures.spearman(p[subsets], -loss[subsets]) for p, loss in pairs], axis=0)

    def _resampled(self, statistic: Any) -> np.ndarray:
        num_subsets, num_queries = self.losses[0].shape
        return measures.resampled(statistic, num_subsets, num_queries, self.times, seed=0)

    def samples(self, key: str) -> np.ndarray:
        """A row's mean LDS for resampled subsets and queries, the same for all rows [times]."""
        return self._resampled(lambda subsets: self._of(key, subsets))

    def ceiling(self) -> Estimate | None:
        """LDS of one seed's losses for another's: how far retraining agrees with itself.

        None with one seed. With more than two, the mean over all pairs.
        """
        if len(self.losses) < 2:
            return None
        pairs = [(a, b) for k, a in enumerate(self.losses) for b in self.losses[k + 1 :]]

        def of(subsets: np.ndarray) -> np.ndarray:
            return np.mean([measures.spearman(a[subsets], b[subsets]) for a, b in pairs], axis=0)

        mean = of(np.arange(len(self.subsets_SN))).mean()
        return measures.interval(self._resampled(of), mean)


def lds_results(lds: Lds, rows: Sequence[Row]) -> tuple[dict[str, dict[str, Any]], str | None]:
    """The LDS of each row by its key, and the key of plain EK-FAC at its best damping.

    Each has "lds", with "by_query"; and, where there is a plain row, "over_plain": by how much it
    is above that one; and "over_equal": above plain EK-FAC at the row's own damping.
    """
    results: dict[str, dict[str, Any]] = {}
    samples = {row.key: lds.samples(row.key) for row in rows}
    for row in rows:
        by_query = lds.by_query(row.key)
        estimate = measures.interval(samples[row.key], by_query.mean())
        results[row.key] = {"lds": {**estimate.as_dict(), "by_query": by_query.tolist()}}
    plain = [row for row in rows if row.is_plain]
    if not plain:
        return results, None
    best = max(plain, key=lambda row: results[row.key]["lds"]["mean"]).key
    for row in rows:
        gain = results[row.key]["lds"]["mean"] - results[best]["lds"]["mean"]
        difference = measures.interval(samples[row.key] - samples[best], gain)
        results[row.key]["over_plain"] = difference.as_dict()
        equal = next((one.key for one in plain if one.damping == row.damping), None)
        if equal is not None and equal != row.key:
            gain = results[row.key]["lds"]["mean"] - results[equal]["lds"]["mean"]
            difference = measures.interval(samples[row.key] - samples[equal], gain)
            results[row.key]["over_equal"] = difference.as_dict()
    return results, best


def chosen_rows(lds: Lds, rows: Sequence[Row], left_out: int) -> list[Row]:
    """Of rows that differ in damping alone, the one with the highest LDS on later queries.

    Args:
        lds: The LDS of all rows.
        rows: The rows.
        left_out: The first so many query groups do not count.
    """
    families: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        families.setdefault(row.family, []).append(row)
    return [
        max(family, key=lambda row: lds.by_query(row.key)[left_out:].mean())
        for family in families.values()
    ]


def most_positive(scores_QN: np.ndarray, query: int, number: int) -> np.ndarray:
    """Columns of a query group's highest scores, the highest first; of equal ones the first."""
    return np.argsort(-scores_QN[query], kind="stable")[:number]


def removal_result(
    removed_losses: np.ndarray, random_losses: np.ndarray, times: int
) -> dict[str, Any]:
    """How much more a query's loss rises without its top sequences than without random ones.

    Args:
        removed_losses: Losses after the removal, of each query and seed [queries, seeds].
        random_losses: Losses after random removals [queries, seeds, removals].
        times: Number of resamples.
    """
    rises = (removed_losses - random_losses.mean(2)).mean(1)
    return {**measures.mean_of_queries(rises, times, 0).as_dict(), "by_query": rises.tolist()}


def recall_result(
    scores: Sequence[np.ndarray], gold: Mapping[int, list[int]], times: int
) -> dict[str, Any]:
    """Mean reciprocal rank, and share of queries with a gold sequence among the first ten.

    Args:
        scores: The scores of each seed [Q, N].
        gold: The columns of the sequences that say it, for query groups that have any.
        times: Number of resamples.
    """
    asked, columns = list(gold), list(gold.values())
    ranks = np.stack([measures.gold_ranks(each[asked], columns) for each in scores])
    reciprocal, in_ten = (1 / ranks).mean(0), (ranks <= 10).mean(0)
    return {
        "mrr": measures.mean_of_queries(reciprocal, times, 0).as_dict(),
        "recall10": measures.mean_of_queries(in_ten, times, 0).as_dict(),
        "num_queries": len(asked),
    }
