"""What the report's page holds: the results of a `query` run, made small enough to inline.

Every number about scores is worked out here and in `spread`; the page only draws. Knows results and
JSON; no HTML.
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
    ResultsReader,
)
from ekfac_dist.report.spread import CARRIED, Distribution, carriers, distribution

FEW_TOKENS = 5  # no more tokens than these are few,
FEW_OF_POSITIONS = 0.1  # nor more than this part of the sequence


@dataclass(frozen=True)
class Ranked:
    """One list of one query, as columns: entry r is the sequence of rank r + 1.

    Attributes:
        index: Row in the data.
        score: As ranked, normalised if the run normalises.
        share: Of the sum of all of the query's scores of its sign; None where there are none.
        nats: To first order; None without the training set's size.
        note: Why a value in nats cannot be; None: it can.
        scan_score: Of the first stage, where there were two.
        pair: Place among the pairs with token scores; None has none.
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
    """One row of the scores.

    Attributes:
        group: Name of the group that the row is the sum of.
        members: Its queries, as in the results.
        top: The most positive sequences.
        bottom: The most negative ones.
        distribution: Of all its scores; of the scan's where there was one.
        spearman: Rank correlation of the scan with exact scores, over sequences spread evenly.
        overlap: Share of the exact lists that the scan's own lists hold, among what was scored
            again; None where that says nothing.
    """

    group: str | None
    members: list[dict[str, Any]]
    top: Ranked
    bottom: Ranked
    distribution: Distribution
    spearman: float | None
    overlap: float | None


@dataclass(frozen=True)
class PagePair:
    """One sequence's token scores for one query. `Arrays` says what is at `start`.

    Attributes:
        start: Of its base64 text, in characters, among all.
        length: Of that text.
        positions: L.
        carriers: The fewest tokens that hold `CARRIED` of Σ|token score|.
        few: Whether they are few.
        strongest: First position of the tokens, read together, with the largest |score|.
    """

    start: int
    length: int
    positions: int
    carriers: int
    few: bool
    strongest: int


@dataclass(frozen=True)
class PageData:
    """All that the page draws from.

    Attributes:
        queries: The rows of the scores.
        sequences: Tokens of the listed sequences, by their row in the data; "" is one that is read
            together with those before it.
        pairs: Where their token scores are.
        arrays: Base64 of each pair's arrays, one after the other, padded each by itself. Little
            endian: token scores float32 [L], module scores float32 [modules], then float32 m and
            int8 q [layers, L] with layer_token_score ≈ m·sign(q)·(q/127)².
        layers: Names, in model order.
        modules: Names.
        module_layers: Number of each module's layer.
        training_size: What divides a raw score to give nats; None: no nats are given.
        normalize: How scores are normalised; "none".
        scan_rank: Of the gradients that all scores come from; None is exact. The lists' own scores
            are exact where they have a `scan_score` too.
        carried: `CARRIED`.
    """

    queries: list[PageQuery]
    sequences: dict[int, list[str]]
    pairs: list[PagePair]
    arrays: str
    layers: list[str]
    modules: list[str]
    module_layers: list[int]
    training_size: int | None
    normalize: str
    scan_rank: int | None
    carried: float = CARRIED

    def json(self) -> dict[str, Any]:
        """Everything but the arrays, for the page's island of JSON."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del plain["arrays"]
        for name in ("queries", "pairs"):
            plain[name] = [dataclasses.asdict(one) for one in plain[name]]
        return plain


def page_data(reader: ResultsReader) -> PageData:
    """Reads a run's results for the page.

    Args:
        reader: The results.

    Raises:
        StoreError: Two files of the results do not fit each other, or a score is not finite.
    """
    manifest = reader.manifest
    layers: list[str] = list(manifest["layers"])
    modules: dict[str, str] = manifest["modules"]
    scores_QN = reader.tensors(SCORES)["scores"]
    rows = reader.lines(QUERIES)
    if scores_QN.ndim != 2 or len(scores_QN) != len(rows) or not scores_QN.numel():
        raise StoreError(
            f"{reader.path}: {SCORES} holds scores of shape {list(scores_QN.shape)} and {QUERIES} "
            f"{len(rows)} rows; one row of scores for each is needed. Run `query` again."
        )
    if not scores_QN.isfinite().all():
        raise StoreError(f"{reader.path}: {SCORES} holds NaN or infinity. Run `query` again.")
    sequences = {row["index"]: row["tokens"] for row in reader.lines(SEQUENCES)}
    places, pairs, arrays = _details(reader, sequences, len(layers), len(modules))
    top = _by_query(reader.lines(TOP), len(rows))
    bottom = _by_query(reader.lines(BOTTOM), len(rows))
    scan, training_size = manifest["scan"], manifest["scores"]["training_size"]
    queries = [
        PageQuery(
            group=row["group"],
            members=row["members"],
            top=_ranked(q, top[q], places, sequences, training_size is not None),
            bottom=_ranked(q, bottom[q], places, sequences, training_size is not None),
            distribution=distribution(scores_QN[q]),
            spearman=scan["spearman"][q] if scan["rescored"] else None,
            overlap=scan["overlap"][q] if scan["rescored"] else None,
        )
        for q, row in enumerate(rows)
    ]
    return PageData(
        queries=queries,
        sequences=sequences,
        pairs=pairs,
        arrays=arrays,
        layers=layers,
        modules=list(modules),
        module_layers=[layers.index(layer) for layer in modules.values()],
        training_size=training_size,
        normalize=manifest["scores"]["normalize"],
        scan_rank=scan["rank"],
    )


def _by_query(lines: Sequence[dict[str, Any]], number: int) -> list[list[dict[str, Any]]]:
    """Each query's lines, in the order of their ranks."""
    found: list[list[dict[str, Any]]] = [[] for _ in range(number)]
    for line in lines:
        found[line["query"]].append(line)
    return [sorted(one, key=lambda line: line["rank"]) for one in found]


def _ranked(
    query: int,
    lines: Sequence[dict[str, Any]],
    places: Mapping[tuple[int, int], int],
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
        pair=[places.get((query, line["index"])) for line in lines],
    )


def _details(
    reader: ResultsReader, sequences: Mapping[int, list[str]], num_layers: int, num_modules: int
) -> tuple[dict[tuple[int, int], int], list[PagePair], str]:
    """Where each (query, sequence) is among the pairs; the pairs; their arrays."""
    if not reader.has(DETAILS):
        return {}, [], ""
    # NumPy: thousands of small arrays, which torch's threads would only slow down.
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
        part = _packed(
            scores_T, details["module_scores"][p], details["layer_token_scores"][:, begin:end]
        )
        count = carriers(scores_T)
        pairs.append(
            PagePair(
                start=start,
                length=len(part),
                positions=len(scores_T),
                carriers=count,
                few=0 < count <= min(FEW_TOKENS, FEW_OF_POSITIONS * len(scores_T)),
                strongest=_strongest(tokens[:-1], scores_T),
            )
        )
        parts.append(part)
        start += len(part)
    return {key: p for p, key in enumerate(keys)}, pairs, "".join(parts)


def _strongest(tokens: Sequence[str], scores_T: np.ndarray) -> int:
    """Where the run of tokens with the largest |sum of scores| begins; 0 if there are no tokens."""
    if not len(tokens):
        return 0
    starts = [t for t, text in enumerate(tokens) if text or t == 0]
    return starts[int(np.abs(np.add.reduceat(scores_T, starts)).argmax())]


def _packed(
    token_scores_T: np.ndarray, module_scores: np.ndarray, layer_scores_LT: np.ndarray
) -> str:
    sizes_LT = np.abs(layer_scores_LT)
    limit = sizes_LT.max(initial=0.0)
    # On a square root's scale 8 bits keep two digits of the small values too, which are the many.
    roots_LT = np.copysign(np.sqrt(sizes_LT / (limit or 1.0)), layer_scores_LT)
    content = [
        token_scores_T.astype("<f4").tobytes(),
        module_scores.astype("<f4").tobytes(),
        np.array(limit, "<f4").tobytes(),
        np.rint(127 * roots_LT).astype(np.int8).tobytes(),
    ]
    return base64.b64encode(b"".join(content)).decode("ascii")
