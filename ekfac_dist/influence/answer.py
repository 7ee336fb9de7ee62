"""The scores of one run of `query` with their origin, and the manifest of its results."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ekfac_dist.config import DataConfig, ModelConfig, QueryConfig
from ekfac_dist.curvature.damping import Damping
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.factors.factors import Factors
from ekfac_dist.factors.layout import FISHER_NAMES, MANIFEST
from ekfac_dist.influence.index.reader import GradientIndex
from ekfac_dist.influence.queries import QuerySet
from ekfac_dist.influence.refined import Refined
from ekfac_dist.influence.scores import InfluenceScores
from ekfac_dist.runtime.files import file_sha256
from ekfac_dist.runtime.software import software

SIGN = "positive: more of the training sequence makes the query more likely; negative: less likely"
CONTRAST_SIGN = " (of a contrast: its completion, beside the one that it is against)"
CONTRAST_SCALE = "; of a contrast, log p(q) is log p(completion) − log p(against)"
# The divisor of a score, by its normalisation.
DIVISORS = {
    "none": "",
    "cosine": ", over sqrt(self-influence of q · self-influence of z)",
    "relatif_l": ", over sqrt(self-influence of z) (RelatIF, ℓ-relative)",
    "relatif_theta": ", over ‖(F+λ)⁻¹ ∇log p(z)‖ (RelatIF, θ-relative)",
}


@dataclass(frozen=True)
class Answer:
    """The scores of one run of `query`, and what they were computed from.

    Attributes:
        scores: The scores.
        queries: The queries.
        train: The whole training set.
        scored: The sequences of it that were scored.
        factors: The factors.
        index: The gradient index that was scanned; None: the data were.
        store: Directory of the factor store.
        damping: How λ was chosen.
        data: Source of the training set.
        model: Source of the model.
        dtype: The model's dtype.
        whole: SHA-256 of all weights of the model.
        config: The run's configuration.
        tokenizer: The model's tokenizer.
        workers: Number of workers, W.
        seconds: Duration of the run, in seconds.
    """

    scores: InfluenceScores
    queries: QuerySet
    train: Sequences
    scored: Sequences
    factors: Factors
    index: GradientIndex | None
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


def sign_in_words(scores: InfluenceScores) -> str:
    """What the sign of a score says, in one line."""
    return f"{SIGN}{CONTRAST_SIGN if scores.has_contrasts else ''}"


def scale_in_words(scores: InfluenceScores) -> str:
    """The formula and scale of a score, in one line."""
    scanned = ""
    if scores.are_approximate:
        scanned = f" (the scan's: approximate, {' and '.join(_low_ranks(scores))})"
    size = scores.training_size
    nats = "" if size is None else f"; nats, to first order = the sum / training size {size}"
    matrix = "F" if scores.refined is None else "G"
    return (
        f"score = ∇log p(q)ᵀ ({matrix}+λ)⁻¹ ∇log p(z), summed over modules{scanned}"
        f"{DIVISORS[scores.normalize]}{nats}{CONTRAST_SCALE if scores.has_contrasts else ''}"
    )


def _low_ranks(scores: InfluenceScores) -> list[str]:
    """Which gradients are of low rank, in words."""
    rank = max(scores.ranks.values(), default=None)
    return [
        *([] if rank is None else [f"query gradients of rank {rank}"]),
        *([] if scores.index_rank is None else [f"training gradients of rank {scores.index_rank}"]),
    ]


def share_in_words(scores: InfluenceScores) -> str:
    """The definition of a share, in one line."""
    return (
        "score / sum of |scores| of all sequences with the same sign for the query"
        f"{', as scanned' if scores.are_approximate else ''}"
    )


def results_manifest(answer: Answer) -> dict[str, Any]:
    """Every entry of the results' manifest but format, complete and files."""
    scores, damping, fitted = answer.scores, answer.damping, answer.factors.manifest
    return {
        "model": _fitted_model_entry(answer),
        "factors": _factors_entry(answer),
        "data": {
            **dataclasses.asdict(answer.data),
            "fingerprint": answer.train.fingerprint,
            "same_as_fitted": answer.train.fingerprint == fitted["data"]["fingerprint"],
            "num_sequences": len(answer.train),
            "num_scored": len(answer.scored),
        },
        "num_queries": len(answer.queries.members),
        "scores": {
            "sign": sign_in_words(scores),
            "scale": scale_in_words(scores),
            "share": share_in_words(scores),
            "normalize": scores.normalize,
            "training_size": scores.training_size,
        },
        "damping": {
            "kind": "relative" if damping.relative else "absolute",
            "scale": damping.scale if damping.relative else None,
            "value": damping.value,
            "modules": dict(damping.modules),
            "absolute": scores.damping,
        },
        "scan": _scan_entry(answer),
        "refine": None if scores.refined is None else _refine_entry(scores.refined),
        "layers": list(scores.layers),
        "modules": {
            name: scores.layers[layer]
            for name, layer in zip(scores.modules, scores.layer_of, strict=True)
        },
        "not_scored": parameters_without_factors(fitted),
        "top_k": len(scores.top[0].columns),
        "bottom_k": len(scores.bottom[0].columns),
        "per_token": answer.config.scores.per_token,
        "tokens": scores.tokens,
        "workers": answer.workers,
        "seconds": round(answer.seconds, 3),
        "software": software(),
        "config": answer.config.as_dict(),
    }


def _fitted_model_entry(answer: Answer) -> dict[str, Any]:
    scores, fitted = answer.scores, answer.factors.manifest["model"]
    return {
        "name": answer.model.name,
        "revision": answer.model.revision,
        "class": fitted["class"],
        "dtype": answer.dtype,
        "fingerprint": fitted["fingerprint"],
        "whole": answer.whole,
        "differs": list(scores.model_differs),
        "not_compared": list(scores.not_compared),
    }


def _factors_entry(answer: Answer) -> dict[str, Any]:
    fitted = answer.factors.manifest
    return {
        "path": answer.store,
        "manifest_sha256": file_sha256(Path(answer.store) / MANIFEST),
        "model": {k: v for k, v in fitted["model"].items() if not isinstance(v, dict)},
        "fisher": FISHER_NAMES[fitted["fisher"]["labels"]],
        **fitted["fisher"],
        "num_sequences": fitted["data"]["num_sequences"],
    }


def _scan_entry(answer: Answer) -> dict[str, Any]:
    scores, config = answer.scores, answer.config.scores
    return {
        "rank": config.effective_rank or max(scores.ranks.values(), default=None),
        "ranks": scores.ranks,
        "num_scans": scores.num_scans,
        "index": None if answer.index is None else _index_entry(answer.index),
        "rescored": config.num_rescored,
        "spread": scores.rescored[0].num_spread if scores.rescored else 0,
        "ends": ["top", "bottom"] if len(scores.bottom[0].columns) else ["top"],
        "spearman": [rescored.spearman for rescored in scores.rescored],
        "spearman_top": [rescored.spearman_top for rescored in scores.rescored],
        "overlap": [rescored.overlap for rescored in scores.rescored],
    }


def _index_entry(index: GradientIndex) -> dict[str, Any]:
    return {
        "path": str(index.path),
        "fingerprint": index.fingerprint,
        **index.manifest["index"],
        "num_sequences": len(index),
    }


def _refine_entry(refined: Refined) -> dict[str, Any]:
    residuals = [row[row.isfinite()].tolist() for row in refined.residuals]
    return {
        "method": refined.settings.method,
        "num_sequences": refined.num_sequences,
        "num_training": refined.num_training,
        "seed": refined.settings.seed,
        "solved": refined.in_words,
        "convergence": refined.convergence_in_words,
        "num_converged": refined.num_converged,
        "residuals": residuals,
    }


def parameters_without_factors(fitted: Mapping[str, Any]) -> dict[str, str]:
    """The reason for each MLP parameter or expert without factors, by its name; none is scored.

    Args:
        fitted: The manifest of the factors.
    """
    return dict(fitted.get("coverage", {}).get("skipped", {}))
