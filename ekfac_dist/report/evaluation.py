"""The table of an evaluation, for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from ekfac_dist.report.tables import table


def evaluation_table(results: Mapping[str, Any]) -> str:
    """The results of `evaluate` as a table, with what its columns mean below.

    Args:
        results: From `run_evaluation`, or `read_results`.
    """
    protocols = results["config"]["protocols"]
    columns = [name for name in _COLUMNS if name.protocol in protocols]
    rows = [row for row in results["rows"] if any(column.of(row) for column in columns)]
    header = ["method", "damping", *(column.title for column in columns)]
    cells = [
        [row["name"], _damping(row), *(column.of(row) or "" for column in columns)] for row in rows
    ]
    return "\n".join([table(header, cells), "", *_notes(results, columns)])


class _Column:
    """A column: which protocol it is of, its title, and the path of its value in a row."""

    def __init__(
        self, protocol: str, title: str, path: Sequence[str], note: str, digits: int = 3
    ) -> None:
        self.protocol, self.title, self.path, self.note = protocol, title, path, note
        self.digits = digits

    def of(self, row: Mapping[str, Any]) -> str | None:
        """The cell: a mean and its interval; None where the row has no such value."""
        value: Any = row
        for name in self.path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is None:
            return None
        mean, low, high = (f"{value[k]:+.{self.digits}f}" for k in ("mean", "low", "high"))
        if self.path != ["over_plain"] and self.protocol != "removal":
            mean, low, high = (text.removeprefix("+") for text in (mean, low, high))
        return f"{mean} [{low}, {high}]".replace("-", "−")


_COLUMNS = (
    _Column("lds", "LDS", ["lds"], "rank correlation of scores with retrained losses"),
    _Column("lds", "over EK-FAC", ["over_plain"], "LDS above that of EK-FAC at its best damping"),
    _Column(
        "removal",
        "removal",
        ["removal"],
        "rise of a query's loss, in nats, when its top sequences are left out, over random ones",
    ),
    _Column(
        "tail_patch",
        "tail patch",
        ["tail_patch"],
        "rise of log p(query), in nats, after one step on a top sequence",
    ),
    _Column("recall", "reciprocal rank", ["recall", "mrr"], "mean 1/rank of the gold sequence"),
    _Column("recall", "recall@10", ["recall", "recall10"], "gold sequence among the first ten"),
)


def _damping(row: Mapping[str, Any]) -> str:
    return "" if row["damping"] is None else f"{row['damping']:g}"


def _notes(results: Mapping[str, Any], columns: Sequence[_Column]) -> list[str]:
    lines = ["[ ]: 95 % bootstrap interval, over queries; for LDS over subsets too."]
    lines += [f"{column.title}: {column.note}." for column in columns]
    ceiling = results.get("ceiling")
    if ceiling is not None:
        mean, low, high = (f"{ceiling[k]:.3f}" for k in ("mean", "low", "high"))
        lines.append(
            f"Noise ceiling: retraining with another seed has LDS {mean} [{low}, {high}]; scores "
            f"that knew its mean would have about its root, {max(ceiling['mean'], 0) ** 0.5:.3f}."
        )
    return lines
