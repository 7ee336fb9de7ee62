"""The JSON of an answer, made of the same results as the report. Knows no HTTP and no workers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ekfac_dist.influence.asking import Ranking, Session
from ekfac_dist.influence.results import BOTTOM, DETAILS, QUERIES, SCORES, SEQUENCES, TOP
from ekfac_dist.influence.results_in_memory import ResultsInMemory
from ekfac_dist.influence.scores import Details
from ekfac_dist.report.page_data import token_summary
from ekfac_dist.report.spread import distribution

_DIGITS = 6  # of the largest score of a token; the others are rounded alike


@dataclass
class Answered:
    """One answer, as it is kept.

    Attributes:
        id: The question's name in addresses.
        request: The request with every default filled in.
        results: The files of `query`'s results.
        index: What the index is: "rank", "dtype".
        stage: "ranking", or "exact" once sequences were scored again.
        seconds: Of each stage of the question.
    """

    id: str
    request: dict[str, Any]
    results: ResultsInMemory
    index: dict[str, Any]
    stage: str
    seconds: dict[str, float]

    @property
    def num_bytes(self) -> int:
        """About how much memory it takes."""
        return self.results.num_bytes

    def json(self) -> dict[str, Any]:
        """The answer, as types that JSON has."""
        results, manifest = self.results, self.results.manifest
        layers = list(manifest["layers"])
        scores_QN = results.tensors(SCORES)["scores"]
        sequences = {line["index"]: line for line in results.lines(SEQUENCES)}
        meaning = {name: manifest["scores"][name] for name in ("sign", "scale", "share")}
        return {
            "id": self.id,
            "question": self.request,
            "model": manifest["model"]["name"],
            "num_sequences": scores_QN.shape[1],
            "layers": layers,
            "modules": list(manifest["modules"]),
            "module_layers": [layers.index(layer) for layer in manifest["modules"].values()],
            "training_size": manifest["scores"]["training_size"],
            "meaning": meaning,
            "index": self.index,
            "query": _query(results),
            "stage": self.stage,
            "top": [_row(line, sequences) for line in results.lines(TOP)],
            "bottom": [_row(line, sequences) for line in results.lines(BOTTOM)],
            "details": self._details(sequences),
            "distribution": asdict(distribution(scores_QN[0])),
            "agreement": _agreement(results),
            "refined": _refined(manifest),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }

    def _details(self, sequences: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        """The details of each listed sequence that was scored exactly, by its index as text."""
        if self.stage == "ranking" or not self.results.has(DETAILS):
            return {}
        found = {name: values.numpy() for name, values in self.results.tensors(DETAILS).items()}
        offsets, of_outputs = found["offsets"], is_of_outputs(self.results.manifest)
        return {
            str(index): detail_json(
                sequences[index]["tokens"],
                found["layer_token_scores"][:, offsets[pair] : offsets[pair + 1]],
                found["module_scores"][pair],
                of_outputs=of_outputs,
            )
            for pair, index in enumerate(found["pair_index"].tolist())
            if index in sequences
        }


def is_of_outputs(manifest: Mapping[str, Any]) -> bool:
    """Whether positions' scores are of the losses of the tokens that they predict."""
    return bool(manifest.get("tokens", "inputs") == "outputs")


def detail_json(
    tokens: Sequence[str],
    layer_token_scores_LT: np.ndarray,
    module_scores: np.ndarray,
    *,
    of_outputs: bool,
) -> dict[str, Any]:
    """One sequence's scores by position, layer and module.

    Args:
        tokens: Its T + 1 tokens.
        layer_token_scores_LT: Scores of each position in each layer.
        module_scores: Scores of each module.
        of_outputs: As of `token_summary`.
    """
    token_scores_T = layer_token_scores_LT.sum(0, dtype=np.float64)
    return {
        "token_scores": _rounded(token_scores_T),
        "layer_token_scores": _rounded(layer_token_scores_LT),
        "module_scores": _rounded(module_scores),
        **asdict(token_summary(tokens, token_scores_T, of_outputs=of_outputs)),
    }


def exact_rows(
    session: Session,
    ranking: Ranking,
    details: Details,
    places: Mapping[int, tuple[str, int]],
    *,
    of_outputs: bool,
) -> list[dict[str, Any]]:
    """A "row" and a "detail" of each sequence that has just been scored exactly.

    Args:
        session: Knows the sequences' texts.
        ranking: The question's ranking.
        details: The exact scores of some sequences.
        places: List and rank of each sequence that the index's ranking lists, by its index.
        of_outputs: As of `token_summary`.
    """
    rows, scores = [], ranking.scores
    layer_scores, modules = details.layer_token_scores.numpy(), details.module_scores.numpy()
    for pair, column in enumerate(details.columns.tolist()):
        sequence = session.sequence(int(scores.indices[column]))
        score = float(modules[pair].sum(dtype=np.float64))
        share = float(scores.in_shares(torch.tensor([score]), 0))
        in_list, rank = places.get(sequence["index"], (None, None))
        row = {
            "in_list": in_list,
            "rank": rank,
            "score": score,
            "share": None if math.isnan(share) else share,
            "scan_score": float(scores.scores[0, column]),
            "exact": True,
            **{name: value for name, value in sequence.items() if name != "is_label"},
        }
        positions = slice(int(details.offsets[pair]), int(details.offsets[pair + 1]))
        detail = detail_json(
            sequence["tokens"], layer_scores[:, positions], modules[pair], of_outputs=of_outputs
        )
        rows.append({"row": row, "detail": detail})
    return rows


def _query(results: ResultsInMemory) -> dict[str, Any]:
    (member,) = results.lines(QUERIES)[0]["members"]
    names = ("prompt", "completion", "tokens", "is_label", "split_token", "nats")
    return {**{name: member[name] for name in names}, "against": member.get("against")}


def _row(line: Mapping[str, Any], sequences: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    names = ("rank", "index", "score", "share", "text", "document", "first_token")
    return {
        **{name: line[name] for name in names if name in line},
        "scan_score": line.get("scan_score"),
        "exact": "scan_score" in line,
        "tokens": sequences[line["index"]]["tokens"],
    }


def _agreement(results: ResultsInMemory) -> dict[str, Any] | None:
    """How well the index's scores agree with the exact ones; None if there are none."""
    scan, tensors = results.manifest["scan"], results.tensors(SCORES)
    if not scan["rescored"] or "exact_scores" not in tensors:
        return None
    return {
        "spearman_top": scan["spearman_top"][0],
        "overlap": scan["overlap"][0],
        "scored_again": len(tensors["exact_scores"]),
    }


def _refined(manifest: Mapping[str, Any]) -> str | None:
    refine = manifest.get("refine")
    return None if refine is None else f"{refine['solved']}; {refine['convergence']}"


def _rounded(values: np.ndarray) -> list[Any]:
    """Numbers to so many digits of the largest of them, as nested lists."""
    exact = values.astype(np.float64)
    largest = np.abs(exact).max(initial=0.0)
    if largest == 0:
        return exact.tolist()
    return exact.round(_DIGITS - 1 - math.floor(math.log10(largest))).tolist()
