"""The rows of an evaluation's table and plot: by method, with the best damping of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ekfac_dist.report.evaluation import OVER_EQUAL, OVER_PLAIN, Column, columns_of, damping_text


@dataclass(frozen=True)
class Family:
    """Rows that differ in nothing but damping.

    Attributes:
        name: The method's name, with that of its choice of modules.
        rows: The rows of the results, with rising damping.
        best: Key of the row with the highest LDS; None with one row, or without LDS.
    """

    name: str
    rows: list[Mapping[str, Any]]
    best: str | None


@dataclass(frozen=True)
class Cell:
    """One estimate in the table.

    Attributes:
        mean: The mean, as text; a dash where it was not measured.
        interval: Its interval, as text; "" where it was not measured.
        kind: Name of its column's protocol.
        verdict: Of a difference whose interval excludes zero "above" or "below"; else "".
    """

    mean: str
    interval: str = ""
    kind: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        damping: Its damping, as text; a dash where the method has none.
        is_best: Whether it has the highest LDS of its family's dampings.
        is_plain: Whether the others' LDS is compared with its.
        cells: Its estimates.
        seconds: Mean over seeds of the seconds that its scores took, as text.
    """

    damping: str
    is_best: bool
    is_plain: bool
    cells: list[Cell]
    seconds: str


def families_of(results: Mapping[str, Any]) -> list[Family]:
    """The rows by method and choice of modules, in the order of the results."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault((row["method"], row["tracked"] or row["name"]), []).append(row)
    return [
        Family(rows[0]["name"], sorted(rows, key=lambda row: row["damping"] or 0), _best(rows))
        for rows in groups.values()
    ]


def lines_of(results: Mapping[str, Any], family: Family) -> list[Line]:
    """A family's lines of the table, one for each damping."""
    columns, plain = columns_of(results), results.get("plain")
    return [
        Line(
            damping=damping_text(row) or "–",
            is_best=row["key"] == family.best,
            is_plain=row["key"] == plain,
            cells=[_cell(column, row, row["key"] == plain) for column in columns],
            seconds=_seconds(row),
        )
        for row in family.rows
    ]


def row_name(row: Mapping[str, Any]) -> str:
    """A row's method with its damping."""
    damping = damping_text(row)
    return f"{row['name']}, damping {damping}" if damping else str(row["name"])


def _best(rows: list[Mapping[str, Any]]) -> str | None:
    measured = [row for row in rows if "lds" in row]
    if len(measured) < 2:
        return None
    return str(max(measured, key=lambda row: row["lds"]["mean"])["key"])


def _cell(column: Column, row: Mapping[str, Any], is_plain: bool) -> Cell:
    parts = column.parts(row)
    if parts is None:
        return Cell("–")
    if column not in (OVER_PLAIN, OVER_EQUAL):
        return Cell(*parts, kind=column.protocol)
    if is_plain and column == OVER_PLAIN:
        return Cell("reference")
    return Cell(*parts, verdict=_verdict(column.estimate(row) or {}))


def _verdict(difference: Mapping[str, float]) -> str:
    if difference["low"] > 0:
        return "above"
    return "below" if difference["high"] < 0 else ""


def _seconds(row: Mapping[str, Any]) -> str:
    known = [seconds for seconds in row["seconds"] if seconds is not None]
    return f"{sum(known) / len(known):,.1f}" if known else "–"
