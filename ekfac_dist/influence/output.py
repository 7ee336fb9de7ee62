"""From an answer to the files that keep it: see `results` for what they are."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ekfac_dist.config import DataConfig, ModelConfig, QueryConfig
from ekfac_dist.curvature.damping import Damping
from ekfac_dist.data.batches import NO_LABEL
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.factors.factors import Factors
from ekfac_dist.factors.layout import FISHER_NAMES, MANIFEST
from ekfac_dist.influence import results
from ekfac_dist.influence.queries import QuerySet
from ekfac_dist.influence.results import ResultsWriter
from ekfac_dist.influence.scores import InfluenceScores, Listed
from ekfac_dist.influence.token_texts import TokenTexts
from ekfac_dist.runtime.files import file_sha256
from ekfac_dist.runtime.software import software

SIGN = "positive: more of the training sequence makes the query more likely; negative: less likely"
# Each normalisation's name for people, and what a score is divided by.
NORMALIZE_NAMES = {
    "none": "none",
    "cosine": "cosine",
    "relatif_l": "RelatIF, ℓ",
    "relatif_theta": "RelatIF, θ",
}
DIVISORS = {
    "none": "",
    "cosine": ", over sqrt(self-influence of q · self-influence of z)",
    "relatif_l": ", over sqrt(self-influence of z) (RelatIF, ℓ-relative)",
    "relatif_theta": ", over ‖(F+λ)⁻¹ ∇log p(z)‖ (RelatIF, θ-relative)",
}


@dataclass(frozen=True)
class Answer:
    """Scores, and what they were computed from.

    Attributes:
        scores: The scores.
        queries: The queries.
        train: The whole training set.
        scored: What was scored of it.
        factors: The factors.
        store: Where they are.
        damping: How λ was chosen.
        data: Where the training set is from.
        model: Where the model is from.
        dtype: What it was held in.
        whole: SHA-256 of all of its weights.
        config: The run's configuration.
        tokenizer: The model's tokenizer.
        workers: W.
        seconds: What the run took.
    """

    scores: InfluenceScores
    queries: QuerySet
    train: Sequences
    scored: Sequences
    factors: Factors
    store: str
    damping: Damping
    data: DataConfig
    model: ModelConfig
    dtype: str
    whole: str
    config: QueryConfig
    tokenizer: Any
    workers: int
    seconds: float


def scale_in_words(scores: InfluenceScores) -> str:
    """What a score is, in one line."""
    rank = max(scores.ranks.values(), default=None)
    scanned = "" if rank is None else f" (the scan's: approximate, query gradients of rank {rank})"
    size = scores.training_size
    nats = "" if size is None else f"; nats, to first order = the sum / training size {size}"
    return (
        f"score = ∇log p(q)ᵀ (F+λ)⁻¹ ∇log p(z), summed over modules{scanned}"
        f"{DIVISORS[scores.normalize]}{nats}"
    )


def share_in_words(scores: InfluenceScores) -> str:
    """What a share is, in one line."""
    return (
        "score / sum of |scores| of all sequences with the same sign for the query"
        f"{', as scanned' if scores.ranks else ''}"
    )


def write_answer(writer: ResultsWriter, answer: Answer, rows: Dataset) -> None:
    """Writes a whole directory of results.

    Args:
        writer: Takes them.
        answer: The answer.
        rows: The training data's rows, for their texts.

    Raises:
        OutputError: It cannot be written.
    """
    scores = answer.scores
    writer.lines(results.QUERIES, _query_lines(answer))
    writer.tensors(results.SCORES, _tensors(scores))
    texts = _Texts(answer, rows)
    writer.lines(results.TOP, _listed_lines(scores, scores.top, texts))
    writer.lines(results.BOTTOM, _listed_lines(scores, scores.bottom, texts))
    columns = np.unique(np.concatenate([end.columns for end in [*scores.top, *scores.bottom]]))
    if scores.details is not None:
        details = scores.details
        writer.tensors(
            results.DETAILS,
            {
                "pair_query": torch.from_numpy(details.rows),
                "pair_index": torch.from_numpy(scores.indices[details.columns]),
                "offsets": torch.from_numpy(details.offsets),
                "token_scores": details.token_scores.float(),
                "layer_token_scores": details.layer_token_scores.float(),
                "module_scores": details.module_scores.float(),
            },
        )
    writer.lines(results.SEQUENCES, (texts.line(int(column)) for column in columns))
    writer.finish(results_manifest(answer))


def results_manifest(answer: Answer) -> dict[str, Any]:
    """Every entry of the results' manifest but format, complete and files."""
    scores, factors, damping = answer.scores, answer.factors, answer.damping
    fitted = factors.manifest
    return {
        "model": {
            "name": answer.model.name,
            "revision": answer.model.revision,
            "class": fitted["model"]["class"],
            "dtype": answer.dtype,
            "fingerprint": fitted["model"]["fingerprint"],
            "whole": answer.whole,
            "differs": list(scores.model_differs),
            "not_compared": list(scores.not_compared),
        },
        "factors": {
            "path": answer.store,
            "manifest_sha256": file_sha256(Path(answer.store) / MANIFEST),
            "model": {k: v for k, v in fitted["model"].items() if not isinstance(v, dict)},
            "fisher": FISHER_NAMES[fitted["fisher"]["labels"]],
            **fitted["fisher"],
            "num_sequences": fitted["data"]["num_sequences"],
        },
        "data": {
            **dataclasses.asdict(answer.data),
            "fingerprint": answer.train.fingerprint,
            "same_as_fitted": answer.train.fingerprint == fitted["data"]["fingerprint"],
            "num_sequences": len(answer.train),
            "num_scored": len(answer.scored),
        },
        "num_queries": len(answer.queries.rows),
        "scores": {
            "sign": SIGN,
            "scale": scale_in_words(scores),
            "share": share_in_words(scores),
            "normalize": scores.normalize,
            "training_size": scores.training_size,
        },
        "damping": {
            "kind": "relative" if damping.relative else "absolute",
            "value": damping.value,
            "modules": dict(damping.modules),
            "absolute": scores.damping,
        },
        "scan": {
            "rank": answer.config.scores.effective_rank,
            "ranks": scores.ranks,
            "num_scans": scores.num_scans,
            "rescored": answer.config.scores.rescore,
            "ends": ["top", "bottom"] if len(scores.bottom[0].columns) else ["top"],
            "spearman": [row.spearman for row in scores.rescored],
            "spearman_top": [row.spearman_top for row in scores.rescored],
            "overlap": [row.overlap for row in scores.rescored],
        },
        "layers": list(scores.layers),
        "modules": {
            name: scores.layers[layer]
            for name, layer in zip(scores.modules, scores.layer_of, strict=True)
        },
        "not_scored": parameters_without_factors(fitted),
        "top_k": len(scores.top[0].columns),
        "bottom_k": len(scores.bottom[0].columns),
        "per_token": answer.config.scores.per_token,
        "workers": answer.workers,
        "seconds": round(answer.seconds, 3),
        "software": software(),
        "config": answer.config.as_dict(),
    }


def parameters_without_factors(fitted: Mapping[str, Any]) -> dict[str, str]:
    """MLP parameters and experts that have no factors, and so no part in any score, and why.

    Args:
        fitted: The manifest of the factors.
    """
    return dict(fitted.get("coverage", {}).get("skipped", {}))


def _tensors(scores: InfluenceScores) -> dict[str, Tensor]:
    tensors = {
        "scores": scores.scores.float(),
        "indices": torch.from_numpy(scores.indices),
    }
    if scores.normalize != "none":
        tensors |= {"norms": scores.norms.float(), "query_norms": scores.query_norms.float()}
    for name in ("module_scores", "layer_scores", "self_influence", "token_scores"):
        found = getattr(scores, name)
        if found is not None:
            tensors[name] = found.float()
    if scores.token_offsets is not None:
        tensors["token_offsets"] = torch.from_numpy(scores.token_offsets)
    if scores.rescored:
        lengths = torch.tensor([len(row.columns) for row in scores.rescored])
        columns = np.concatenate([row.columns for row in scores.rescored])
        tensors |= {
            "exact_query": torch.arange(len(lengths)).repeat_interleave(lengths),
            "exact_index": torch.from_numpy(scores.indices[columns]),
            "exact_scores": torch.cat([row.exact_scores for row in scores.rescored]).float(),
            "scan_scores": torch.cat([row.scan_scores for row in scores.rescored]).float(),
        }
    return tensors


def _query_lines(answer: Answer) -> Iterator[dict[str, Any]]:
    texts, sequences = answer.queries.texts, answer.queries.sequences
    tokens = TokenTexts(answer.tokenizer)
    assert texts is not None
    assert isinstance(sequences, Sequences)
    for row, (numbers, group) in enumerate(
        zip(answer.queries.rows, answer.queries.groups, strict=True)
    ):
        members = []
        for number in numbers:
            sequence = sequences[number]
            ids, is_label = _whole(sequence.inputs, sequence.targets)
            members.append(
                {
                    "line": texts[number].line,
                    "prompt": texts[number].prompt,
                    "completion": texts[number].completion,
                    "tokens": tokens.of(ids),
                    "is_label": is_label,
                    "split_token": answer.queries.split_tokens[number],
                    "nats": answer.scores.query_losses[number],
                }
            )
        yield {"query": row, "group": group, "members": members}


def _whole(inputs: np.ndarray, targets: np.ndarray) -> tuple[list[int], list[bool]]:
    """All of a sequence's tokens, the last one too, and whether each carries a label."""
    ids = [*inputs.tolist(), int(targets[-1])]
    return ids, [False, *(targets != NO_LABEL).tolist()]


class _Texts:
    """Texts and tokens of the scored sequences, by column."""

    def __init__(self, answer: Answer, rows: Dataset) -> None:
        self._answer = answer
        self._rows = rows
        self._tokens = TokenTexts(answer.tokenizer)

    def text(self, column: int) -> str:
        """Prompt and text, as they were tokenised together."""
        data, index = self._answer.data, int(self._answer.scored.indices[column])
        row = self._rows[index]
        prompt = (row[data.prompt] or "") if data.prompt is not None else ""
        return f"{prompt}{row[data.text] or ''}"

    def line(self, column: int) -> dict[str, Any]:
        """What the file of sequences says of one."""
        sequence = self._answer.scored[column]
        ids, is_label = _whole(sequence.inputs, sequence.targets)
        return {
            "index": sequence.index,
            "text": self.text(column),
            "tokens": self._tokens.of(ids),
            "is_label": is_label,
        }


def _listed_lines(
    scores: InfluenceScores, ends: list[Listed], texts: _Texts
) -> Iterator[dict[str, Any]]:
    losses = scores.losses
    for row, end in enumerate(ends):
        shares = scores.in_shares(end.scores, row).tolist()
        nats = scores.in_nats(end.scores, row, end.columns)
        for rank, column in enumerate(end.columns.tolist(), start=1):
            share = shares[rank - 1]
            line = {
                "query": row,
                "rank": rank,
                "index": int(scores.indices[column]),
                "score": float(end.scores[rank - 1]),
                "share": None if math.isnan(share) else share,
                "nats": None if nats is None else float(nats[rank - 1]),
                "text": texts.text(column),
            }
            if scores.rescored:
                line["scan_score"] = float(scores.scores[row, column])
            if nats is not None and nats[rank - 1] > losses[row]:
                line["note"] = _beyond_in_words(losses[row])
            yield line


def _beyond_in_words(loss: float) -> str:
    """Why a value in nats cannot be, which is above a row's −log p."""
    return (
        f"above the query's −log p, {loss:.3g} nats, which is all that it can gain: too far for "
        "first order"
    )
