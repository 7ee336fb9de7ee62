"""The configuration of `evaluate`."""

import dataclasses
import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ekfac_dist.config.checks import require_choice, require_count, require_given, require_positive
from ekfac_dist.config.estimate import DataConfig, FactorsConfig, ModelConfig
from ekfac_dist.config.refine import RefineConfig
from ekfac_dist.errors import ConfigError

Schedule = Literal["constant", "linear", "cosine"]
Start = Literal["model", "random"]
Batches = Literal["gaps", "refilled"]
Protocol = Literal["lds", "removal", "tail_patch", "recall"]
Method = Literal[
    "random",
    "bm25",
    "gradient_dot",
    "gradient_cosine",
    "kfac",
    "ekfac",
    "ekfac_cosine",
    "ekfac_cg",
    "ekfac_astra",
]
# All but those that solve for each query, which take longer than all others together.
_DEFAULT_METHODS: tuple[Method, ...] = get_args(Method)[:-2]


@dataclass(kw_only=True)
class TrainingConfig:
    """The recipe by which the model to be explained is trained, and each model of the bank.

    AdamW on the mean loss over a step's labels; every parameter is trained.

    Args:
        start: From the weights of the model (model), or from its configuration and random weights
            (random), drawn by the run's seed.
        epochs: How often each sequence is trained on; 0: the model is explained as it is, for
            recall and tail patches.
        batch_size: Sequences in a step.
        learning_rate: The highest learning rate.
        schedule: What follows the warm-up: constant, or to zero at the end, linear or cosine.
        warmup_steps: Steps in which the learning rate rises linearly from zero.
        weight_decay: AdamW's weight decay.
        clip_norm: Gradients of a larger norm are scaled to it; null: never.
        batches: What a subset's batches are: those of all sequences, with gaps where sequences are
            left out, so that all models take the same steps (gaps); or full batches of what is left
            of the same order (refilled).
    """

    start: Start = "model"
    epochs: int = 4
    batch_size: int = 16
    learning_rate: float = 5e-4
    schedule: Schedule = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    batches: Batches = "gaps"

    def __post_init__(self) -> None:
        require_choice("training.start", self.start, get_args(Start))
        require_choice("training.schedule", self.schedule, get_args(Schedule))
        require_choice("training.batches", self.batches, get_args(Batches))
        require_count("training.epochs", self.epochs)
        require_positive("training.batch_size", self.batch_size)
        require_count("training.warmup_steps", self.warmup_steps)
        _require_between("training.learning_rate", self.learning_rate, 0, math.inf)
        if self.weight_decay != 0:
            _require_between("training.weight_decay", self.weight_decay, 0, math.inf)
        if self.clip_norm is not None:
            _require_between("training.clip_norm", self.clip_norm, 0, math.inf)


@dataclass(kw_only=True)
class LdsConfig:
    """The linear datamodeling score, LDS: rank correlation of scores with retrained losses.

    Args:
        subsets: Number of subsets that models are trained on.
        keep: Share of the sequences in each subset: 0.5 are random halves; above 0.5, what is left
            out of one subset after another is disjoint until all sequences had their turn.
        seed: Seed of the subsets.
    """

    subsets: int = 100
    keep: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive("lds.subsets", self.subsets)
        if self.subsets < 3:
            raise ConfigError(
                f"lds.subsets is {self.subsets}; a rank correlation needs 3 subsets or more."
            )
        require_count("lds.seed", self.seed)
        _require_between("lds.keep", self.keep, 0, 1)


@dataclass(kw_only=True)
class RemovalConfig:
    """Retraining without each query's most positive sequences.

    Args:
        queries: The first so many queries are asked; each method's damping is the one with the
            highest LDS on the others.
        share: Share of the sequences that is removed.
        random: Number of random removals of the same size that the rise is compared with.
    """

    queries: int = 10
    share: float = 0.05
    random: int = 5

    def __post_init__(self) -> None:
        require_positive("removal.queries", self.queries)
        require_positive("removal.random", self.random)
        _require_between("removal.share", self.share, 0, 1)


@dataclass(kw_only=True)
class TailPatchConfig:
    """One step of training on each of a query's most positive sequences.

    Args:
        top: Number of sequences of each query.
        learning_rate: Of the step, AdamW's first; null: that of the recipe.
    """

    top: int = 5
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        require_positive("tail_patch.top", self.top)
        if self.learning_rate is not None:
            _require_between("tail_patch.learning_rate", self.learning_rate, 0, math.inf)


@dataclass(kw_only=True)
class EvaluateConfig:
    """A whole run of `evaluate`.

    Args:
        model: The model that training starts from, or whose configuration and tokenizer are used.
        data: The text that it is trained on, and whose sequences are scored.
        queries: A .jsonl file of queries, as of `query`; for recall each has "gold", the index in
            the data, from 0, of the sequence that says it, or a list of such.
        training: The recipe.
        factors: The factors that are fitted to the trained model.
        protocols: What is measured.
        methods: The methods that are compared.
        dampings: The dampings that K-FAC and EK-FAC are tried with, as multiples of mean(Λ).
        damping_scales: Other scales of Λ that plain EK-FAC is tried with multiples of, as of
            damping.scale of queries: trimmed, geometric.
        tracked: Other choices of modules that EK-FAC is tried with beside model.modules, by the
            name that a row gets, as lists of globs.
        scores: Files with other tools' scores, by the name that a row gets: safetensors with a
            tensor `scores` [queries, sequences]; {seed} in a path stands for the seed.
        lds: The linear datamodeling score.
        removal: Retraining without the most positive sequences.
        tail_patch: A step on the most positive sequences.
        cg: How ekfac_cg refines.
        astra: How ekfac_astra refines.
        seeds: Seeds of training, each with a model, factors and a bank of its own. Two or more show
            how far retraining itself agrees: the ceiling of LDS.
        bootstrap: Number of resamples of the intervals.
        batch_tokens: Most tokens in a worker's step of fits and scores.
        rank: Rank of the query gradients in scans, for models that are too large for whole ones;
            null: whole, and scores are exact.
        query_memory_gb: Each worker's budget for query gradients, in GB (10⁹ bytes).
        output: Directory of the evaluation.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    queries: str | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)
    factors: FactorsConfig = field(default_factory=FactorsConfig)
    protocols: list[Protocol] = field(default_factory=lambda: ["lds"])
    methods: list[Method] = field(default_factory=lambda: list(_DEFAULT_METHODS))
    dampings: list[float] = field(default_factory=lambda: [0.001, 0.1, 10.0])
    damping_scales: list[Literal["trimmed", "geometric"]] = field(default_factory=list)
    tracked: dict[str, list[str]] = field(default_factory=dict)
    scores: dict[str, str] = field(default_factory=dict)
    lds: LdsConfig = field(default_factory=LdsConfig)
    removal: RemovalConfig = field(default_factory=RemovalConfig)
    tail_patch: TailPatchConfig = field(default_factory=TailPatchConfig)
    cg: RefineConfig = field(default_factory=lambda: RefineConfig(method="cg"))
    astra: RefineConfig = field(default_factory=lambda: RefineConfig(method="astra"))
    seeds: list[int] = field(default_factory=lambda: [0])
    bootstrap: int = 1000
    batch_tokens: int = 4096
    rank: int | None = None
    query_memory_gb: float = 4.0
    output: str | None = None

    def __post_init__(self) -> None:
        require_given(
            {
                "model.name": self.model.name,
                "data.source": self.data.source,
                "queries": self.queries,
                "output": self.output,
            }
        )
        self.model.name = os.path.expanduser(self.model.name or "")
        self.data.source = os.path.expanduser(self.data.source or "")
        self.queries = os.path.expanduser(self.queries or "")
        self.output = os.path.expanduser(self.output or "")
        require_positive("batch_tokens", self.batch_tokens)
        require_positive("bootstrap", self.bootstrap)
        if self.rank is not None:
            require_positive("rank", self.rank)
        _require_between("query_memory_gb", self.query_memory_gb, 0, math.inf)
        self._check_lists()
        self._check_model()

    def _check_lists(self) -> None:
        for protocol in self.protocols:
            require_choice("protocols", protocol, get_args(Protocol))
        for method in self.methods:
            require_choice("methods", method, get_args(Method))
        for name in ("protocols", "methods", "dampings", "seeds", "damping_scales"):
            values = getattr(self, name)
            optional = name == "damping_scales" or (name == "methods" and self.scores)
            if not values and not optional:
                raise ConfigError(f"{name} is empty; give at least one.")
            if len(set(values)) < len(values):
                raise ConfigError(f"{name} is {values}; give each once.")
        for seed in self.seeds:
            require_count("seeds", seed)
        for damping in self.dampings:
            _require_between("dampings", damping, 0, math.inf)
        if "removal" in self.protocols and "lds" not in self.protocols:
            raise ConfigError(
                "protocols has removal without lds, by which each method's damping is chosen; add "
                "lds."
            )

        for name in ("cg", "astra"):
            if getattr(self, name).method != name:
                raise ConfigError(
                    f"{name}.method is {getattr(self, name).method}; it is {name}: leave it out."
                )
        retrains = [name for name in ("lds", "removal") if name in self.protocols]
        if retrains and not self.training.epochs:
            raise ConfigError(
                f"training.epochs is 0, so the model stays as it is, but protocols has "
                f"{retrains[0]}, which retrains it; give epochs of 1 or more, or other protocols."
            )
        if not self.training.epochs and (len(self.seeds) > 1 or self.training.start == "random"):
            raise ConfigError(
                "training.epochs is 0, so the model stays as it is; leave training.start and the "
                "seeds but one out."
            )

    def _check_model(self) -> None:
        if self.model.dtype not in ("float32", "float64"):
            raise ConfigError(
                f"model.dtype is {self.model.dtype}; evaluate trains models, in float32 or float64."
            )
        for name in ("adapter", "quantization", "device_map"):
            value = getattr(self.model, name)
            if value is not None:
                raise ConfigError(
                    f"model.{name} is {value!r}; evaluate trains whole models, on one device each: "
                    "leave it out."
                )

    def as_dict(self) -> dict[str, Any]:
        """The whole configuration as plain nested dictionaries."""
        return dataclasses.asdict(self)


def _require_between(name: str, value: object, low: float, high: float) -> None:
    """Refuses everything but a number strictly between two."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low < value < high:  # type: ignore[operator]
        bounds = f"above {low:g}" + (f" and below {high:g}" if high < math.inf else "")
        raise ConfigError(f"{name} is {value!r}; it must be a finite number {bounds}.")
