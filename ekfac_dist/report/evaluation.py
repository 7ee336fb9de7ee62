"""The table of an evaluation, for a terminal; its columns and their notes are those of the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ekfac_dist.report.tables import table


def evaluation_table(results: Mapping[str, Any]) -> str:
    """The results of `evaluate` as a table, with what its columns mean below.

    Args:
        results: From `run_evaluation`, or `read_results`.
    """
    columns = columns_of(results)
    rows = [row for row in results["rows"] if any(column.of(row) for column in columns)]
    header = ["method", "damping", *(column.title for column in columns)]
    cells = [
        [row["name"], damping_text(row), *(column.of(row) or "" for column in columns)]
        for row in rows
    ]
    return "\n".join([table(header, cells), "", *notes(results, columns)])


@dataclass(frozen=True)
class Column:
    """A column of estimates.

    Attributes:
        protocol: The protocol that measures it.
        title: Its heading.
        path: Where a row of the results has its estimate.
        note: What it means.
        signed: Whether a number above zero has its sign.
    """

    protocol: str
    title: str
    path: tuple[str, ...]
    note: str
    signed: bool = False

    def estimate(self, row: Mapping[str, Any]) -> Mapping[str, float] | None:
        """The mean and its interval; None where the row has none."""
        value: Any = row
        for name in self.path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def parts(self, row: Mapping[str, Any]) -> tuple[str, str] | None:
        """The mean, and its interval, as text; None where the row has none."""
        estimate = self.estimate(row)
        if estimate is None:
            return None
        mean, low, high = (number_text(estimate[k], self.signed) for k in ("mean", "low", "high"))
        return mean, f"[{low}, {high}]"

    def of(self, row: Mapping[str, Any]) -> str | None:
        """The cell: a mean and its interval; None where the row has none."""
        parts = self.parts(row)
        return None if parts is None else " ".join(parts)


LDS = Column("lds", "LDS", ("lds",), "rank correlation of scores with retrained losses")
OVER_PLAIN = Column(
    "lds", "over EK-FAC", ("over_plain",), "LDS above that of EK-FAC at its best damping", True
)
OVER_EQUAL = Column(
    "lds", "at equal damping", ("over_equal",), "LDS above that of EK-FAC at the same damping", True
)
_COLUMNS = (
    LDS,
    OVER_PLAIN,
    OVER_EQUAL,
    Column(
        "removal",
        "removal",
        ("removal",),
        "rise of a query's loss, in nats, when its top sequences are left out, over random ones",
        True,
    ),
    Column(
        "tail_patch",
        "tail patch",
        ("tail_patch",),
        "rise of log p(query), in nats, after one step on a top sequence",
    ),
    Column("recall", "reciprocal rank", ("recall", "mrr"), "mean 1/rank of the gold sequence"),
    Column("recall", "recall@10", ("recall", "recall10"), "gold sequence among the first ten"),
)


def columns_of(results: Mapping[str, Any]) -> list[Column]:
    """The columns of what was measured."""
    asked = [column for column in _COLUMNS if column.protocol in results["config"]["protocols"]]
    return [column for column in asked if any(column.estimate(row) for row in results["rows"])]


def number_text(value: float, signed: bool = False) -> str:
    """A measured value with three decimals."""
    return f"{value:{'+' if signed else ''}.3f}".replace("-", "−")


def damping_text(row: Mapping[str, Any]) -> str:
    """A row's damping; "" where there is none."""
    return "" if row["damping"] is None else f"{row['damping']:g}"


def notes(results: Mapping[str, Any], columns: Sequence[Column]) -> list[str]:
    """Sentences that say what intervals, columns and the noise ceiling are."""
    lines = ["[ ]: 95 % bootstrap interval, over queries; for LDS over subsets too."]
    lines += [f"{column.title}: {column.note}." for column in columns]
    ceiling = results.get("ceiling")
    if ceiling is not None:
        mean, low, high = (number_text(ceiling[k]) for k in ("mean", "low", "high"))
        lines.append(
            f"Noise ceiling: retraining with another seed has LDS {mean} [{low}, {high}]; scores "
            f"that knew its mean would have about its root, {number_text(ceiling_root(ceiling))}."
        )
    return lines


def ceiling_root(ceiling: Mapping[str, float]) -> float:
    """About the LDS of scores that knew the mean over seeds."""
    return max(ceiling["mean"], 0.0) ** 0.5
