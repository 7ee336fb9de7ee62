"""The data of the report's page: a `query` run's results, packed to be stored inside the page.

All statistics of scores are computed here and in `spread`; the page's script only draws. Knows
results and JSON, but no HTML.
"""

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ekfac_dist.errors import StoreError
from ekfac_dist.influence.results import (
    BOTTOM,
    DETAILS,
    QUERIES,
    SCORES,
    SEQUENCES,
    TOP,
    Results,
)
from ekfac_dist.report.spread import CARRIED, Distribution, carriers, distribution

# A score rests on few tokens if at most so many carry nearly all of it, and at most this fraction
# of the sequence.
FEW_TOKENS = 5
FEW_OF_POSITIONS = 0.1


@dataclass(frozen=True)
class Ranked:
    """One ranked list of one query, as columns: entry r belongs to the sequence of rank r + 1.

    Attributes:
        index: Index of the sequence in the data.
        score: The score that the list is sorted by, normalised if the run normalises.
        share: The score divided by the sum of all the query's scores of its sign, with its sign;
            after a scan, by the sum of the scan's scores, and None where that sum is zero.
        nats: The score in nats, to first order; None without the training set's size.
        note: Why the value in nats is impossible; None where it is possible.
        scan_score: Score in the low-rank scan, if sequences were scored again exactly after it.
        pair: Index in `PageData.pairs`; None for a sequence without token scores.
    """

    index: list[int]
    score: list[float]
    share: list[float | None]
    nats: list[float] | None
    note: list[str | None]
    scan_score: list[float] | None
    pair: list[int | None]


@dataclass(frozen=True)
class PageQuery:
    """One query, or a group of queries whose gradients are summed.

    Attributes:
        group: Name of the group; None for a single query.
        members: The query or the group's queries, as in the results.
        top: The most positive sequences.
        bottom: The most negative sequences.
        distribution: Distribution of all scores; of the scan's scores if there was a scan.
        spearman: Rank correlation of the scan's scores with exact scores, over sequences evenly
            spread over the data; None without a scan, or where it is not defined.
        overlap: Share of the exact lists that the scan's own lists contain, among the sequences
            scored again; None where no more sequences were scored again than are listed.
    """

    group: str | None
    members: list[dict[str, Any]]
    top: Ranked
    bottom: Ranked
    distribution: Distribution
    spearman: float | None
    overlap: float | None


@dataclass(frozen=True, kw_only=True)
class TokenSummary:
    """On which tokens a sequence's score rests.

    Attributes:
        carriers: The fewest tokens that hold `CARRIED` of Σ|token score|.
        few: Whether these are few; see `FEW_TOKENS`.
        strongest: First token of the run of tokens with the largest |sum of scores|. Tokens of a
            run can be read only together, such as the bytes of one character.
    """

    carriers: int
    few: bool
    strongest: int


def token_summary(tokens: Sequence[str], scores_T: np.ndarray, *, of_outputs: bool) -> TokenSummary:
    """On which tokens a sequence's score rests.

    Args:
        tokens: The T + 1 tokens.
        scores_T: The positions' scores.
        of_outputs: Whether they belong to the tokens 1 to T; else to 0 to T − 1.
    """
    count = carriers(scores_T)
    return TokenSummary(
        carriers=count,
        few=0 < count <= min(FEW_TOKENS, FEW_OF_POSITIONS * len(scores_T)),
        strongest=_strongest(tokens, scores_T, of_outputs=of_outputs),
    )


@dataclass(frozen=True, kw_only=True)
class PagePair(TokenSummary):
    """Where one sequence's token scores for one query are in `PageData.arrays`, and a summary.

    Attributes:
        start: First character of its base64 text.
        length: Number of characters of that text.
        positions: L, the sequence's number of positions.
    """

    start: int
    length: int
    positions: int


@dataclass(frozen=True)
class PageData:
    """All data of the page.

    Attributes:
        queries: The queries and groups, in the order of the score rows.
        sequences: Token texts of the listed sequences, by index in the data; "" for a token whose
            text is part of an earlier one's.
        origins: (row of the source, first token in it) of those that are parts of rows, by index.
        pairs: The pairs of query and sequence that have token scores.
        arrays: Base64 of each pair's arrays, each encoded and padded separately and then joined.
            Little endian: token scores float32 [L], module scores float32 [modules], then float32 m
            and int8 q [layers, L], with layer_token_score ≈ m·sign(q)·(q/127)².
        layers: Names of the layers, in model order.
        modules: Names of the modules.
        module_layers: Index of each module's layer.
        training_size: The training set's size, by which a raw score is divided to give nats; None
            if nats are not shown.
        normalize: Name of the normalisation of scores, or "none".
        tokens: What position t's score is of: of its input, so of token t ("inputs"); or of its
            loss, so of token t + 1, which it predicts ("outputs").
        scan_rank: Rank of the gradients that all scores were computed from; None if they are exact.
            Scores in lists that have a `scan_score` too are exact.
        carried: `CARRIED`.
    """

    queries: list[PageQuery]
    sequences: dict[int, list[str]]
    origins: dict[int, tuple[int, int]]
    pairs: list[PagePair]
    arrays: str
    layers: list[str]
    modules: list[str]
    module_layers: list[int]
    training_size: int | None
    normalize: str
    tokens: str
    scan_rank: int | None
    carried: float = CARRIED

    def json(self) -> dict[str, Any]:
        """Everything except the arrays, as types that JSON has."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["arrays"]
        for name in ("queries", "pairs"):
            fields[name] = [dataclasses.asdict(entry) for entry in fields[name]]
        return fields


def page_data(reader: Results) -> PageData:
    """Reads a run's results and packs them for the page.

    Args:
        reader: The results.

    Raises:
        StoreError: If files of the results are inconsistent, or a score is not finite.
    """
    manifest = reader.manifest
    layers: list[str] = list(manifest["layers"])
    modules: dict[str, str] = manifest["modules"]
    scores_QN = reader.tensors(SCORES)["scores"]
    query_lines = reader.lines(QUERIES)
    num_queries = len(query_lines)
    if scores_QN.ndim != 2 or len(scores_QN) != num_queries or not scores_QN.numel():
        raise StoreError(
            f"{reader.path}: {SCORES} holds scores of shape {list(scores_QN.shape)} and {QUERIES} "
            f"{num_queries} rows; one row of scores for each is needed. Run `query` again."
        )
    if not scores_QN.isfinite().all():
        raise StoreError(f"{reader.path}: {SCORES} holds NaN or infinity. Run `query` again.")
    sequence_lines = reader.lines(SEQUENCES)
    sequences = {line["index"]: line["tokens"] for line in sequence_lines}
    # Results of earlier versions do not say.
    of_outputs = manifest.get("tokens", "inputs") == "outputs"
    pair_indices, pairs, arrays = _packed_details(
        reader, sequences, len(layers), len(modules), of_outputs=of_outputs
    )
    top = _by_query(reader.lines(TOP), num_queries)
    bottom = _by_query(reader.lines(BOTTOM), num_queries)
    scan, training_size = manifest["scan"], manifest["scores"]["training_size"]
    queries = [
        PageQuery(
            group=line["group"],
            members=line["members"],
            top=_ranked(q, top[q], pair_indices, sequences, training_size is not None),
            bottom=_ranked(q, bottom[q], pair_indices, sequences, training_size is not None),
            distribution=distribution(scores_QN[q]),
            spearman=scan["spearman"][q] if scan["rescored"] else None,
            overlap=scan["overlap"][q] if scan["rescored"] else None,
        )
        for q, line in enumerate(query_lines)
    ]
    return PageData(
        queries=queries,
        sequences=sequences,
        origins={
            line["index"]: (line["document"], line["first_token"])
            for line in sequence_lines
            if "document" in line
        },
        pairs=pairs,
        arrays=arrays,
        layers=layers,
        modules=list(modules),
        module_layers=[layers.index(layer) for layer in modules.values()],
        training_size=training_size,
        normalize=manifest["scores"]["normalize"],
        tokens="outputs" if of_outputs else "inputs",
        scan_rank=scan["rank"] or (scan.get("index") or {}).get("rank"),
    )


def _by_query(lines: Sequence[dict[str, Any]], number: int) -> list[list[dict[str, Any]]]:
    """The lines of each of a number of queries, sorted by rank."""
    lists: list[list[dict[str, Any]]] = [[] for _ in range(number)]
    for line in lines:
        lists[line["query"]].append(line)
    return [sorted(ranked, key=lambda line: line["rank"]) for ranked in lists]


def _ranked(
    query: int,
    lines: Sequence[dict[str, Any]],
    pair_indices: Mapping[tuple[int, int], int],
    sequences: Mapping[int, list[str]],
    in_nats: bool,
) -> Ranked:
    missing = [line["index"] for line in lines if line["index"] not in sequences]
    if missing:
        raise StoreError(f"{SEQUENCES} lacks sequence {missing[0]}, which a list holds.")
    two_stage = bool(lines) and all("scan_score" in line for line in lines)
    return Ranked(
        index=[line["index"] for line in lines],
        score=[line["score"] for line in lines],
        share=[line["share"] for line in lines],
        nats=[line["nats"] for line in lines] if in_nats else None,
        note=[line.get("note") for line in lines],
        scan_score=[line["scan_score"] for line in lines] if two_stage else None,
        pair=[pair_indices.get((query, line["index"])) for line in lines],
    )


def _packed_details(
    reader: Results,
    sequences: Mapping[int, list[str]],
    num_layers: int,
    num_modules: int,
    *,
    of_outputs: bool,
) -> tuple[dict[tuple[int, int], int], list[PagePair], str]:
    """Index of each (query, sequence) among the pairs; the pairs; their arrays as base64."""
    if not reader.has(DETAILS):
        return {}, [], ""
    # NumPy, because the arrays are thousands of small ones, which torch's threads only slow down.
    details = {name: tensor.numpy() for name, tensor in reader.tensors(DETAILS).items()}
    keys = list(zip(details["pair_query"].tolist(), details["pair_index"].tolist(), strict=True))
    offsets = details["offsets"].tolist()
    shapes = {
        "offsets": [len(keys) + 1],
        "token_scores": [offsets[-1]],
        "layer_token_scores": [num_layers, offsets[-1]],
        "module_scores": [len(keys), num_modules],
    }
    for name, shape in shapes.items():
        if list(details[name].shape) != shape or not np.isfinite(details[name]).all():
            raise StoreError(
                f"{reader.path}: {name} in {DETAILS} is {list(details[name].shape)} and must be "
                f"{shape}, all finite. Run `query` again."
            )
    pairs, parts, start = [], [], 0
    for p, (begin, end) in enumerate(pairwise(offsets)):
        scores_T, tokens = details["token_scores"][begin:end], sequences[keys[p][1]]
        if len(tokens) != len(scores_T) + 1:
            raise StoreError(
                f"{reader.path}: sequence {keys[p][1]} has {len(tokens)} tokens and "
                f"{len(scores_T)} token scores; there must be one score fewer than tokens."
            )
        part = _base64_arrays(
            scores_T, details["module_scores"][p], details["layer_token_scores"][:, begin:end]
        )
        summary = token_summary(tokens, scores_T, of_outputs=of_outputs)
        pairs.append(
            PagePair(start=start, length=len(part), positions=len(scores_T), **vars(summary))
        )
        parts.append(part)
        start += len(part)
    return {key: p for p, key in enumerate(keys)}, pairs, "".join(parts)


def _strongest(tokens: Sequence[str], scores_T: np.ndarray, *, of_outputs: bool) -> int:
    """First token of the run of tokens with the largest |sum of scores|.

    Args:
        tokens: The T + 1 tokens.
        scores_T: The positions' scores.
        of_outputs: Whether they belong to the tokens 1 to T; else to 0 to T − 1.
    """
    by_token = np.concatenate([[0], scores_T] if of_outputs else [scores_T, [0]])
    starts = [t for t, text in enumerate(tokens) if text or t == 0]
    return starts[int(np.abs(np.add.reduceat(by_token, starts)).argmax())]


def _base64_arrays(
    token_scores_T: np.ndarray, module_scores: np.ndarray, layer_scores_LT: np.ndarray
) -> str:
    sizes_LT = np.abs(layer_scores_LT)
    limit = sizes_LT.max(initial=0.0)
    # Most values are small; on a square-root scale 8 bits keep two digits of them as well.
    roots_LT = np.copysign(np.sqrt(sizes_LT / (limit or 1.0)), layer_scores_LT)
    content = [
        token_scores_T.astype("<f4").tobytes(),
        module_scores.astype("<f4").tobytes(),
        np.array(limit, "<f4").tobytes(),
        np.rint(127 * roots_LT).astype(np.int8).tobytes(),
    ]
    return base64.b64encode(b"".join(content)).decode("ascii")
