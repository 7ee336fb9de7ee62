"""What `query` says at its end: what the scores are, and the ends of each row."""

from typing import Any

from ekfac_dist.influence import results
from ekfac_dist.influence.results import ResultsReader
from ekfac_dist.report.tables import table

_ROWS_SHOWN = 5
_QUERIES_SHOWN = 10
_TEXT_WIDTH = 60


def answer_tables(path: str) -> str:
    """A query run's results, for a terminal.

    Args:
        path: The directory of results.

    Raises:
        StoreError: It is no whole directory of results.
    """
    reader = ResultsReader(path)
    manifest = reader.manifest
    queries = reader.lines(results.QUERIES)
    ends = [reader.lines(results.TOP), reader.lines(results.BOTTOM)]
    lines = [""]
    for query in queries[:_QUERIES_SHOWN]:
        lines += [*_query_lines(query), ""]
        rows = []
        for listed in ends:
            mine = [line for line in listed if line["query"] == query["query"]]
            rows += [_cells(line) for line in mine[:_ROWS_SHOWN]]
        if rows:
            lines += [
                table(
                    ["index", "score", "nats"],
                    [row[:3] for row in rows],
                    last=[row[3] for row in rows],
                ),
                "",
            ]
    if len(queries) > _QUERIES_SHOWN:
        lines += [f"… and {len(queries) - _QUERIES_SHOWN} more rows of scores", ""]
    took = f"took          {manifest['seconds']:.1f} s on {_count(manifest['workers'], 'worker')}"
    return "\n".join([*lines, *meaning(manifest), took, f"results       {path}"])


def meaning(manifest: dict[str, Any]) -> list[str]:
    """What a run's scores mean: sign, scale, Fisher, damping, and how good its scan was.

    Args:
        manifest: Of a directory of results.
    """
    factors, damping, scan = manifest["factors"], manifest["damping"], manifest["scan"]
    unit = " · mean(Λ) of each module" if damping["kind"] == "relative" else ", absolute"
    others = ", ".join(f"{name}: {value}" for name, value in damping["modules"].items())
    lines = [
        f"sign          {manifest['scores']['sign']}",
        f"scale         {manifest['scores']['scale']}",
        f"normalised    {manifest['scores']['normalize']}",
        f"fisher        {factors['fisher']} (labels: {factors['labels']}), refit: "
        f"{factors['refit']}, fitted on {factors['num_sequences']} sequences",
        f"damping       {damping['value']}{unit}{f'; {others}' if others else ''}",
    ]
    if scan["rank"] is None:
        return [*lines, "gradients     whole: scores are exact"]
    lines.append(f"gradients     of rank {scan['rank']}: the scan's scores are approximate")
    if scan["rescored"]:
        known = [value for value in scan["spearman"] if value is not None]
        lines.append(
            f"re-scored     {scan['rescored']} at either end, exactly: rank correlation "
            f"{_mean(known)}, lists' overlap {_mean(scan['overlap'])}"
        )
    return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _mean(values: list[float]) -> str:
    """Mean and least of some values."""
    if not values:
        return "undefined"
    return f"{sum(values) / len(values):.3f} (least {min(values):.3f})"


def _query_lines(query: dict[str, Any]) -> list[str]:
    name = f" ({query['group']}: {len(query['members'])} queries summed)" if query["group"] else ""
    lines = [f"query {query['query']}{name}"]
    for member in query["members"][:3]:
        lines.append(f"  {_short(member['prompt'])} → {_short(member['completion'])}")
        lines.append(f"  −log p {member['nats']:.2f} nats")
    return lines


def _cells(line: dict[str, Any]) -> list[str]:
    return [
        str(line["index"]),
        f"{line['score']:+.4g}",
        f"{line['nats']:+.3g}",
        _short(line["text"]),
    ]


def _short(text: str) -> str:
    """One line's worth of a text."""
    flat = " ".join(text.split())
    return flat if len(flat) <= _TEXT_WIDTH else flat[: _TEXT_WIDTH - 1] + "…"
