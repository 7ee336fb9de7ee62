"""The methods that are compared, and the scores of each: [query groups, sequences], kept in files.

    random           independent normal numbers
    bm25             BM25 of the query's words against each sequence's
    gradient_dot     ∇log p(q)ᵀ ∇log p(z), of the tracked modules
    gradient_cosine  the same over both norms
    kfac             ∇log p(q)ᵀ (F + λ)⁻¹ ∇log p(z), F with K-FAC's Λ
    ekfac            the same, F with the corrected eigenvalues
    ekfac_cosine     the same over both norms in the inner product of (F + λ)⁻¹
    ekfac_cg         EK-FAC's solution refined by conjugate gradients on the Gauss–Newton matrix
    ekfac_astra      the same by ASTRA

Scores of gradients are by the same code as `query`, exact unless a rank is given.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import bm25s
import numpy as np
from safetensors import SafetensorError, safe_open
from torch import nn

from ekfac_dist.config import EvaluateConfig, RefineConfig, ScoresConfig
from ekfac_dist.curvature.damping import SCALES, Damping
from ekfac_dist.errors import DataError, first_line
from ekfac_dist.evaluate.curvatures import identity, kfac
from ekfac_dist.evaluate.inputs import Inputs
from ekfac_dist.factors.factors import Factors
from ekfac_dist.factors.reader import StoreReader
from ekfac_dist.influence.checks import check_model_and_sequences, scoring_context
from ekfac_dist.influence.scoring import compute_scores
from ekfac_dist.models.capture.prepare import prepared
from ekfac_dist.runtime.processes import World

NAMES = {
    "random": "random",
    "bm25": "BM25",
    "gradient_dot": "gradient dot",
    "gradient_cosine": "gradient cosine",
    "kfac": "K-FAC",
    "ekfac": "EK-FAC",
    "ekfac_cosine": "EK-FAC, cosine",
    "ekfac_cg": "EK-FAC + CG",
    "ekfac_astra": "EK-FAC + ASTRA",
}
PLAIN = "ekfac"  # the method that others are compared with
_DAMPED = ("kfac", "ekfac", "ekfac_cosine", "ekfac_cg", "ekfac_astra")


@dataclass(frozen=True)
class Row:
    """One row of the table: a method with its settings.

    Attributes:
        method: The method's name in the configuration; "scores" for another tool's.
        name: Its name for people.
        damping: The multiple of mean(Λ), or of another scale of Λ; None where there is none.
        scale: What it is a multiple of, as of `Damping`.
        tracked: Name of the choice of modules; "" for that of `model.modules`.
        file: Another tool's file of scores.
    """

    method: str
    name: str
    damping: float | None = None
    scale: str = "mean"
    tracked: str = ""
    file: str = ""

    @property
    def key(self) -> str:
        """A name that no other row of the run has, fit for a file."""
        parts = [self.method, self.name if self.method == "scores" else self.tracked]
        if self.scale != "mean":
            parts.append(self.scale)
        if self.damping is not None:
            parts.append(f"{self.damping:g}")
        return "-".join(re.sub(r"[^\w.]+", "_", part) for part in parts if part)

    @property
    def family(self) -> tuple[str, str]:
        """What rows that differ in nothing but damping have in common."""
        return self.method, self.tracked or self.name

    def path(self, seed: int) -> Path:
        """Another tool's file of scores for a seed."""
        return Path(self.file.replace("{seed}", str(seed)))

    @property
    def is_plain(self) -> bool:
        """Whether it is plain EK-FAC with relative damping, which others are compared with."""
        return self.method == PLAIN and self.scale == "mean" and not self.tracked


def rows_of(config: EvaluateConfig) -> list[Row]:
    """The rows of the table, in its order."""
    rows = []
    for method in config.methods:
        dampings = config.dampings if method in _DAMPED else [None]
        rows += [Row(method, NAMES[method], damping) for damping in dampings]
    for name in config.tracked:
        rows += [
            Row(PLAIN, f"{NAMES[PLAIN]}, {name}", damping, tracked=name)
            for damping in config.dampings
        ]
    for scale in config.damping_scales:
        rows += [
            Row(PLAIN, f"{NAMES[PLAIN]}, λ of {SCALES[scale]}", damping, scale)
            for damping in config.dampings
        ]
    rows += [Row("scores", name, file=file) for name, file in config.scores.items()]
    return rows


@dataclass(frozen=True)
class Explained:
    """A trained model with its data, queries and factors: what scores are computed from.

    Attributes:
        model: The model.
        config: The evaluation.
        inputs: Data and queries.
        stores: Directories of the factors, by the name of the choice of modules.
        seed: The seed of training.
        world: The workers.
    """

    model: nn.Module
    config: EvaluateConfig
    inputs: Inputs
    stores: Mapping[str, Path]
    seed: int
    world: World

    @property
    def shape(self) -> tuple[int, int]:
        """(query groups, sequences)."""
        return len(self.inputs.queries.members), len(self.inputs.sequences)


def refinement_of(row: Row, config: EvaluateConfig) -> RefineConfig | None:
    """How a row's method refines query gradients; None where it does not."""
    return {"ekfac_cg": config.cg, "ekfac_astra": config.astra}.get(row.method)


def scores_of(row: Row, explained: Explained) -> np.ndarray:
    """A method's scores, float32 [query groups, sequences]; a collective.

    Raises:
        DataError: If another tool's file cannot be read, or has another shape.
    """
    if row.method == "random":
        generator = np.random.default_rng([explained.seed, 4])
        return generator.standard_normal(explained.shape).astype(np.float32)
    if row.method == "bm25":
        return _bm25(explained)
    if row.method == "scores":
        return read_scores(row.path(explained.seed), explained.shape)
    return _gradient_scores(row, explained)


def _gradient_scores(row: Row, explained: Explained) -> np.ndarray:
    reader = StoreReader(explained.stores[row.tracked], verify=True)
    factors, damping = Factors(reader), Damping(row.damping, scale=row.scale)
    if row.method in ("gradient_dot", "gradient_cosine"):
        factors, damping = identity(reader), Damping(1.0, relative=False)
    elif row.method == "kfac":
        factors = kfac(reader)
    config = ScoresConfig(
        normalize="cosine" if row.method.endswith("cosine") else "none",
        per_token="none",
        top_k=1,
        bottom_k=0,
        rank=explained.config.rank,
        query_memory_gb=explained.config.query_memory_gb,
    )
    model, inputs = explained.model, explained.inputs
    queries, sequences = inputs.queries, inputs.sequences
    with prepared(model):
        check_model_and_sequences(
            str(reader.path),
            factors,
            model,
            sequences,
            queries,
            explained.world,
            advice="set data.max_tokens to {context} or less",
            allow_changes=False,
        )
        context = scoring_context(
            model,
            factors,
            damping,
            explained.world,
            explained.config.batch_tokens,
            True,
            config,
            len(queries.members),
            refine=refinement_of(row, explained.config),
        )
        scores = compute_scores(context, queries, sequences, config)
    return scores.scores.float().numpy()


def _bm25(explained: Explained) -> np.ndarray:
    """BM25 of each query group's words, in lower case, against each sequence's.

    Of a contrast it is the difference of both texts'.
    """
    index, queries = bm25s.BM25(), explained.inputs.queries
    index.index([words(text) for text in explained.inputs.texts()], show_progress=False)
    assert queries.texts is not None

    def of(asked: list[str]) -> np.ndarray:
        known = [word for text in asked for word in words(text) if word in index.vocab_dict]
        return index.get_scores(known) if known else np.zeros(explained.shape[1])

    scores = []
    for members in queries.members:
        texts = [queries.texts[query] for query in members]
        others = [text.prompt + text.against for text in texts if text.against is not None]
        scores.append(of([text.prompt + text.completion for text in texts]) - of(others))
    return np.stack(scores).astype(np.float32)


def words(text: str) -> list[str]:
    """A text's words, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def read_scores(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Scores of a file: safetensors with a tensor `scores` [query groups, sequences].

    The results of `query` have such a file. Sequences are in data order, all of them.

    Raises:
        DataError: If it cannot be read, has another shape, or holds NaN or infinity.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            scores = opened.get_tensor("scores").float().numpy()
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(
            f"The scores {path} cannot be read: {first_line(error)}. Give a safetensors file with "
            "a tensor scores [queries, sequences]."
        ) from error
    if scores.shape != shape:
        raise DataError(
            f"The scores {path} are {' × '.join(map(str, scores.shape))}, but there are {shape[0]} "
            f"queries and {shape[1]} sequences; give a score for each of both, in the order of the "
            "data."
        )
    if not np.isfinite(scores).all():
        raise DataError(f"The scores {path} hold NaN or infinity; give finite numbers.")
    return scores
