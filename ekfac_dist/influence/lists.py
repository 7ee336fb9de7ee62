"""The lists of the sequences with the highest and lowest scores, and exact scores for them.

After a low-rank scan, lists can be made from exact scores. For each query group three sets of
sequences are scored again: the scan's highest, its lowest, and as many spread evenly over the data,
by which the scan is judged. Knows scores only; `scoring` computes them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.config import DEFAULT_TOP_K, ScoresConfig
from ekfac_dist.errors import ConfigError
from ekfac_dist.influence.agreement import spearman
from ekfac_dist.influence.scores import InfluenceScores, Listed, Rescored

# The lists of one query group: the most positive sequences, and the most negative ones.
Lists = tuple[Listed, Listed]


def list_lengths(config: ScoresConfig, num_scored: int) -> tuple[int, int]:
    """Lengths of a query group's lists of (the most positive, the most negative) sequences.

    Args:
        config: The scores that are asked for.
        num_scored: How many sequences are scored.

    Raises:
        ConfigError: If more sequences are to be listed, or scored again, than are scored; or fewer
            are to be scored again than listed.
    """
    top_k = min(DEFAULT_TOP_K, num_scored) if config.top_k is None else config.top_k
    bottom_k = top_k if config.bottom_k is None else config.bottom_k
    for name, value in (("top_k", top_k), ("bottom_k", bottom_k), ("rescore", config.num_rescored)):
        if value > num_scored:
            raise ConfigError(
                f"scores.{name} is {value}, but only {num_scored} sequences are scored; give "
                f"{num_scored} or less."
            )
    if 0 < config.num_rescored < max(top_k, bottom_k):
        raise ConfigError(
            f"scores.rescore is {config.num_rescored}, but lists of {max(top_k, bottom_k)} are "
            "asked for; score at least as many again."
        )
    return top_k, bottom_k


def make_lists(
    scores: Tensor, columns: np.ndarray, indices: np.ndarray, lengths: tuple[int, int]
) -> Lists:
    """The sequences with the largest and with the smallest of some scores of one query group.

    Equal scores are listed in data order.

    Args:
        scores: The scores [C].
        columns: Their sequences' columns [C], ascending.
        indices: Index in the data of every column [N].
        lengths: Lengths of both lists, at most C.
    """
    lists = []
    for descending, length in zip((True, False), lengths, strict=True):
        order = torch.sort(scores, descending=descending, stable=True).indices[:length]
        listed = columns[order.numpy()]
        lists.append(Listed(listed, indices[listed], scores[order]))
    top, bottom = lists
    return top, bottom


def listed_pairs(groups: Sequence[int], lists: Mapping[int, Lists]) -> list[tuple[int, int]]:
    """(slot, column) of every sequence that is listed for some query groups.

    Args:
        groups: Indices of the query groups, by slot.
        lists: The lists of each query group, by its index.
    """
    return [
        (slot, int(column))
        for slot, group in enumerate(groups)
        for listed in lists[group]
        for column in listed.columns
    ]


@dataclass(frozen=True)
class Chosen:
    """Columns of the sequences that are scored again for one query group.

    Attributes:
        top: Those with the scan's highest scores.
        bottom: Those with the scan's lowest; empty if no negative ones are listed.
        spread: As many, spread evenly over the data.
    """

    top: np.ndarray
    bottom: np.ndarray
    spread: np.ndarray

    def columns(self) -> Iterable[int]:
        """All columns, some of them twice or more."""
        return (int(column) for part in (self.top, self.bottom, self.spread) for column in part)


def choose_for_rescoring(
    result: InfluenceScores, group: int, number: int, list_lengths: tuple[int, int]
) -> Chosen:
    """Chooses the sequences of one query group that are scored again.

    Args:
        result: The results, with the scan's scores.
        group: The query group.
        number: How many sequences at each end of the scan's scores.
        list_lengths: Lengths of the lists of the (most positive, most negative) sequences.
    """
    num_columns = len(result.indices)
    top, bottom = make_lists(
        result.scores[group],
        np.arange(num_columns),
        result.indices,
        (number, number if list_lengths[1] else 0),
    )
    spread = np.linspace(0, num_columns - 1, num=number).round().astype(np.int64)
    return Chosen(top.columns, bottom.columns, spread)


def exact_lists(
    result: InfluenceScores,
    group: int,
    columns: np.ndarray,
    exact: Tensor,
    chosen: Chosen,
    list_lengths: tuple[int, int],
) -> tuple[Lists, Rescored]:
    """The lists of one query group by exact scores, and how these compare with the scan's.

    Args:
        result: The results, with the scan's scores.
        group: The query group.
        columns: Columns of the sequences that were scored again [C], ascending.
        exact: Their exact scores [C].
        chosen: The same sequences, by how they were chosen.
        list_lengths: Lengths of the lists of the (most positive, most negative) sequences.
    """
    scanned = result.scores[group][torch.from_numpy(columns)]
    by_exact = make_lists(exact, columns, result.indices, list_lengths)
    by_scan = make_lists(scanned, columns, result.indices, list_lengths)
    num_common = sum(
        len(np.intersect1d(one.columns, other.columns))
        for one, other in zip(by_exact, by_scan, strict=True)
    )

    def correlation(subset: np.ndarray) -> float | None:
        in_subset = torch.from_numpy(np.isin(columns, subset))
        return spearman(scanned[in_subset], exact[in_subset])

    rescored = Rescored(
        columns,
        scanned,
        exact,
        num_spread=len(chosen.spread),
        spearman=correlation(chosen.spread),
        spearman_top=correlation(chosen.top),
        overlap=num_common / sum(list_lengths) if len(chosen.top) > max(list_lengths) else None,
    )
    return by_exact, rescored
