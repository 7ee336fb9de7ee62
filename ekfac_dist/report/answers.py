"""The summary that `query` prints: what the scores mean, and each query's strongest sequences."""

from collections.abc import Mapping
from typing import Any

from ekfac_dist.curvature.damping import SCALES
from ekfac_dist.influence import results
from ekfac_dist.influence.results import ResultsReader
from ekfac_dist.report.tables import table
from ekfac_dist.runtime.terminal import visible

_SEQUENCES_SHOWN = 5
_QUERIES_SHOWN = 10
_TEXT_WIDTH = 60


def answer_tables(path: str) -> str:
    """A query run's results as text for a terminal.

    Args:
        path: The directory of results.

    Raises:
        StoreError: If it is no complete directory of results.
    """
    reader = ResultsReader(path)
    manifest = reader.manifest
    queries = reader.lines(results.QUERIES)
    ends = [reader.lines(results.TOP), reader.lines(results.BOTTOM)]
    lines = [""]
    for query in queries[:_QUERIES_SHOWN]:
        lines += [*_query_heading(query), ""]
        for name, ranked in zip(("most positive", "most negative"), ends, strict=True):
            shown = [line for line in ranked if line["query"] == query["query"]]
            shown = shown[:_SEQUENCES_SHOWN]
            if shown:
                lines += [name, _sequences_table(shown), *_notes(shown), ""]
    if len(queries) > _QUERIES_SHOWN:
        lines += [f"… and {len(queries) - _QUERIES_SHOWN} more rows of scores", ""]
    duration = (
        f"took          {manifest['seconds']:.1f} s on {_count(manifest['workers'], 'worker')}"
    )
    return "\n".join([*lines, *meaning(manifest), duration, f"results       {visible(path)}"])


def meaning(manifest: dict[str, Any]) -> list[str]:
    """Lines that say what a run's scores mean: sign, scale, Fisher, damping, accuracy of the scan.

    Args:
        manifest: Manifest of a directory of results.
    """
    return list(map(visible, _meaning_lines(manifest)))


def _meaning_lines(manifest: dict[str, Any]) -> list[str]:
    factors, damping, scan = manifest["factors"], manifest["damping"], manifest["scan"]
    unit = ", absolute"
    if damping["kind"] == "relative":
        unit = f" · {SCALES[damping.get('scale', 'mean')]} of each module"
    module_values = ", ".join(f"{name}: {value}" for name, value in damping["modules"].items())
    lines = [
        f"sign          {manifest['scores']['sign']}",
        f"scale         {manifest['scores']['scale']}",
        f"share         {manifest['scores']['share']}",
        f"normalised    {manifest['scores']['normalize']}",
        f"fisher        {factors['fisher']} (labels: {factors['labels']}), refit: "
        f"{factors['refit']}, fitted on {factors['num_sequences']} sequences",
        f"damping       {damping['value']}{unit}{f'; {module_values}' if module_values else ''}",
        *(f"model differs {sentence}" for sentence in manifest["model"].get("differs", ())),
        *(f"not compared  {sentence}" for sentence in manifest["model"].get("not_compared", ())),
    ]
    if manifest.get("tokens") == "outputs":
        lines.append(
            "tokens        of losses: a position's score is what predicting its token does"
        )
    refine = manifest.get("refine")  # not in results of earlier versions
    if refine is not None:
        lines += [
            f"refined       {refine['solved']}",
            f"              {refine['convergence']}",
        ]
    low_rank = low_rank_gradients(scan)
    if low_rank is None:
        exact = "exact" if refine is None else "exact, for the refined query gradients"
        return [*lines, f"gradients     whole: scores are {exact}"]
    lines.append(f"gradients     {low_rank}: the scan's scores are approximate")
    if scan["rescored"]:
        lines += [
            f"re-scored     exactly, {rescored(scan)}",
            f"              rank correlation {_mean(scan['spearman'])} over the evenly spread, "
            f"{_mean(scan['spearman_top'])} within the top end",
            f"              overlap of the lists {_mean(scan['overlap'])}, of what was re-scored",
        ]
    return lines


def low_rank_gradients(scan: Mapping[str, Any]) -> str | None:
    """Phrase that says which gradients of a scan were of low rank; None: none were.

    Args:
        scan: The entry `scan` of the manifest.
    """
    index = scan.get("index")  # not in results of earlier versions
    phrases = [
        *([] if scan["rank"] is None else [f"of rank {scan['rank']}"]),
        *([] if index is None else [f"of the index, of rank {index['rank']}"]),
    ]
    return ", and those ".join(phrases) or None


def rescored(scan: Mapping[str, Any]) -> str:
    """Phrase that says which sequences were scored exactly after a low-rank scan.

    Args:
        scan: The entry `scan` of the manifest.
    """
    where = "either end" if "bottom" in scan["ends"] else "the top end"
    spread = scan.get("spread", scan["rescored"])  # not in results of earlier versions
    return f"{scan['rescored']:,} at {where}" + (
        f" and {spread:,} spread over the data" if spread else ""
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _mean(values: list[float | None]) -> str:
    """Mean and minimum of the values that are not None, as text."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "not known"
    return f"{sum(numbers) / len(numbers):.3f} (least {min(numbers):.3f})"


def _query_heading(query: dict[str, Any]) -> list[str]:
    """Number of the query, or name of the group, and the first of its queries' texts."""
    name = ""
    if query["group"] is not None:
        name = f" ({visible(query['group'])}: {len(query['members'])} queries summed)"
    lines = [f"query {query['query']}{name}"]
    for member in query["members"][:3]:
        prompt = f"{_on_one_line(member['prompt'])} → " if member["prompt"] else ""
        lines.append(f"  {prompt}{_on_one_line(member['completion'])}")
        if other := member.get("against"):
            lines.append(f"  rather than {_on_one_line(other['completion'])}")
            lines.append(f"  −log p {member['nats']:.2f}, rather than {other['nats']:.2f}")
        else:
            lines.append(f"  −log p {member['nats']:.2f}")
    return lines


def _sequences_table(lines: list[dict[str, Any]]) -> str:
    """Table of ranked sequences, with scores in nats where the training set's size is known."""
    with_nats = lines[0]["nats"] is not None
    header = ["index", "score", "share", *(["nats, first order"] if with_nats else [])]
    cells = []
    for line in lines:
        share = "–" if line["share"] is None else f"{line['share']:+.2%}"
        cells.append([_place(line), f"{line['score']:+.4g}", share])
        if with_nats:
            cells[-1].append(f"{line['nats']:+.3g}{' !' if 'note' in line else '  '}")
    return table(header, cells, last=[_on_one_line(line["text"]) for line in lines])


def _place(line: dict[str, Any]) -> str:
    """The index of a ranked sequence, and what it is a part of."""
    if "document" not in line:
        return str(line["index"])
    return f"{line['index']} (row {line['document']}, token {line['first_token']})"


def _notes(lines: list[dict[str, Any]]) -> list[str]:
    """The note that explains the mark "!"; all marked lines of a list have the same one."""
    return [f"! {line['note']}" for line in lines if "note" in line][:1]


def _on_one_line(text: str) -> str:
    """A text with white space collapsed, cut to `_TEXT_WIDTH` characters."""
    flat = visible(" ".join(text.split()))
    return flat if len(flat) <= _TEXT_WIDTH else flat[: _TEXT_WIDTH - 1] + "…"
