"""The configuration of `query`."""

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from ekfac_dist.config.checks import require_choice, require_count, require_given, require_positive
from ekfac_dist.config.estimate import (
    Checkpointing,
    DataConfig,
    DeviceMap,
    Dtype,
    ModelConfig,
    Quantization,
)
from ekfac_dist.config.fields import field_types
from ekfac_dist.config.refine import RefineConfig
from ekfac_dist.errors import ConfigError

T = TypeVar("T")
Normalize = Literal["none", "cosine", "relatif_l", "relatif_theta"]
PerToken = Literal["none", "top", "all"]
DampingScale = Literal["mean", "trimmed", "geometric"]
Tokens = Literal["inputs", "outputs"]

DEFAULT_RANK = 32
DEFAULT_TOP_K = 20
DEFAULT_RESCORE = 100


@dataclass(kw_only=True)
class QueryModelConfig:
    """Which model answers; what is null is as it was when the factors were fitted.

    Args:
        name: Hub id or local directory.
        revision: Hub revision (branch, tag or commit).
        gguf: Name of a GGUF file there.
        dtype: Of weights and activations: float64, float32, bfloat16, float16 or auto.
        adapter: Hub id or local directory of a PEFT LoRA adapter.
        quantization: Quantise linear weights to 8bit or 4bit when they are loaded.
        device_map: How Accelerate spreads the model of a single worker over its devices; null: all
            on one device, however it was fitted.
        gradient_checkpointing: Compute each layer again in the backward instead of holding its
            activations: less memory, more work; auto: where they would not fit into memory. Never
            taken from a store.
        trust_remote_code: Run Python code that comes with the model; never taken from a store.
        allow_changes: Answer even with a model that differs from the fitted one outside the
            tracked modules; the results say in what.
    """

    name: str | None = None
    revision: str | None = None
    gguf: str | None = None
    dtype: Dtype | None = None
    adapter: str | None = None
    quantization: Quantization | None = None
    device_map: DeviceMap | None = None
    gradient_checkpointing: Checkpointing = "auto"
    trust_remote_code: bool = False
    allow_changes: bool = False

    def over(self, fitted: Mapping[str, Any]) -> ModelConfig:
        """The fitted model's configuration, with the fields that are set here in its place.

        Args:
            fitted: The configuration `model` in the factors' manifest.

        Raises:
            ConfigError: If no model is named, or the manifest has unknown fields.
        """
        # These belong to the machine, not to the model.
        fitted = {**fitted, "device_map": None, "gradient_checkpointing": "auto"}
        own_fields = _set_fields(self)
        del own_fields["allow_changes"]  # belongs to the comparison, not to the model
        model = _over(ModelConfig, fitted, own_fields)
        require_given({"model.name": model.name})
        return model


@dataclass(kw_only=True)
class QueryDataConfig:
    """Which training sequences are scored.

    Without `source` they are those that the factors were fitted on, and what is null is as it was
    then; with it, what is null has the default that it has in `estimate`.

    Args:
        source: A file, a saved `datasets` directory, or a hub id.
        subset: Which subset of a hub data set that has several.
        split: Which split of the source.
        text: Column that holds the text.
        prompt: Column of a text that comes before it and whose tokens carry no label.
        template: Text of several columns, as '{title}: {text}'.
        messages: Column of chats, whose last turns carry labels.
        tokens: Column of token ids, for data that is tokenised.
        label_mask: Column with a 0 for each token without label.
        documents: Column of where the documents in a row begin.
        max_tokens: Longer sequences are cut to this many tokens.
        window: Or a window of max_tokens begins every so many.
        max_sequences: Use only the first so many rows.
    """

    source: str | None = None
    subset: str | None = None
    split: str | None = None
    text: str | None = None
    prompt: str | None = None
    template: str | None = None
    messages: str | None = None
    tokens: str | None = None
    label_mask: str | None = None
    documents: str | None = None
    max_tokens: int | None = None
    window: int | None = None
    max_sequences: int | None = None

    def over(self, fitted: Mapping[str, Any]) -> DataConfig:
        """The fitted data's configuration, or the defaults, with the fields that are set here.

        Args:
            fitted: The configuration `data` in the factors' manifest.

        Raises:
            ConfigError: If no source is named, or the manifest has unknown fields.
        """
        data = _over(DataConfig, fitted if self.source is None else {}, _set_fields(self))
        require_given({"data.source": data.source})
        data.source = os.path.expanduser(data.source or "")
        return data


def _over(config_class: type[T], fitted: Mapping[str, Any], own_fields: Mapping[str, Any]) -> T:
    unknown = [name for name in fitted if name not in field_types(config_class)]
    if unknown:
        raise ConfigError(
            f"The factors' manifest has a configuration with {', '.join(map(str, unknown))}, which "
            "this version does not know; use the version that fitted them, or fit them again."
        )
    return config_class(**{**fitted, **own_fields})


def _set_fields(config: Any) -> dict[str, Any]:
    """The fields that are not null."""
    return {name: value for name, value in vars(config).items() if value is not None}


@dataclass(kw_only=True)
class DampingConfig:
    """The damping λ of each module.

    Args:
        value: λ of every module: a multiple of mean(Λ) of the module or, with relative false, λ
            itself.
        relative: Whether values are multiples of the module's mean(Λ).
        scale: What relative values multiply: mean(Λ) of the module (mean), the same without the
            largest hundredth of its entries (trimmed), or its geometric mean (geometric).
        modules: Other values for some modules, by name or glob; an exact name wins over globs, and
            of several matching globs the first.
    """

    value: float = 0.1
    relative: bool = True
    scale: DampingScale = "mean"
    modules: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class ScoresConfig:
    """Which scores are computed, and how they are shown.

    Args:
        normalize: What scores are divided by, against sequences that score high for every query:
            none; cosine (both norms in the inner product of (F + λ)⁻¹); relatif_l (the root of
            the sequence's self-influence) or relatif_theta (the norm of (F + λ)⁻¹ times its
            gradient), both of RelatIF.
        top_k: Length of each query's list of the most positive sequences; null: 20.
        bottom_k: Length of its list of the most negative; null: as top_k.
        per_token: Which sequences get a score for each of their positions: the listed ones (top),
            all, or none.
        tokens: What a position's score is of: what the position's input adds to the sequence's
            gradient (inputs), or the loss of the token that it predicts (outputs), for which each
            such sequence is run again for each query.
        per_module: Store the scores of each module too.
        per_layer: Store the scores of each layer too.
        self_influence: Store each training sequence's influence on itself.
        low_rank: Whether the scan of the data uses query gradients of low rank, which take less
            memory and give approximate scores; null: only if a rank is given.
        rank: The rank of those gradients; null: 32.
        rescore: After a scan of low rank, or of an index, score so many sequences at either end of
            it again, exactly, and as many spread evenly over the data, to tell how good the scan
            was; null: 100 of an index, else none.
        candidates: Score only these sequences: a list of their indices in the data, from 0, or a
            file of them (JSON, or an index in each line).
        training_size: Number of sequences that the model was trained on, if it was trained on this
            data: then scores are given in nats too, to first order; null: no nats.
        query_memory_gb: Each worker's budget for query gradients, in GB (10⁹ bytes); queries that
            do not fit are answered in several blocks, with one scan of the data each.
        shard: Number of workers that share out one copy of the factors and query gradients, a
            divisor of the number of workers; inputs and output gradients travel to the worker that
            holds a module's. 1: every worker holds all; auto: the fewest that hold all query
            gradients in one block, or all workers. It need not be that of the fit.
    """

    normalize: Normalize = "none"
    top_k: int | None = None
    bottom_k: int | None = None
    per_token: PerToken = "top"
    tokens: Tokens = "inputs"
    per_module: bool = False
    per_layer: bool = False
    self_influence: bool = False
    low_rank: bool | None = None
    rank: int | None = None
    rescore: int | None = None
    candidates: list[int] | str | None = None
    training_size: int | None = None
    query_memory_gb: float = 4.0
    shard: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        require_choice("scores.normalize", self.normalize, get_args(Normalize))
        require_choice("scores.per_token", self.per_token, get_args(PerToken))
        require_choice("scores.tokens", self.tokens, get_args(Tokens))
        if self.tokens == "outputs" and self.per_token == "none":
            raise ConfigError(
                "scores.tokens is outputs, but scores.per_token is none, so no position has a "
                "score; set scores.per_token to top or all, or leave scores.tokens out."
            )
        for name in ("top_k", "rank", "training_size"):
            value = getattr(self, name)
            if value is not None:
                require_positive(f"scores.{name}", value)
        if self.bottom_k is not None:
            require_count("scores.bottom_k", self.bottom_k)
        if self.rescore is not None:
            require_count("scores.rescore", self.rescore)
        if self.rank is not None and self.low_rank is False:
            raise ConfigError(
                f"scores.rank is {self.rank}, but scores.low_rank is false; give one of them."
            )
        if self.shard != "auto":
            require_positive("scores.shard", self.shard)
        memory = self.query_memory_gb
        if not isinstance(memory, (int, float)) or not 0 < memory < math.inf:
            raise ConfigError(
                f"scores.query_memory_gb is {memory!r}; it must be a finite number above 0."
            )

    @property
    def num_rescored(self) -> int:
        """How many sequences at either end of a scan are scored again."""
        return self.rescore or 0

    @property
    def effective_rank(self) -> int | None:
        """The rank of the scan's query gradients; None: they are whole."""
        return self.rank or (DEFAULT_RANK if self.low_rank else None)


def require_rescorable(scores: ScoresConfig, *, from_index: bool) -> None:
    """Refuses to score sequences again that have exact scores, or to explain approximate ones.

    Args:
        scores: The scores that are asked for.
        from_index: Whether they are of an index.

    Raises:
        ConfigError: If they cannot be meant.
    """
    if not from_index:
        if scores.rescore and scores.effective_rank is None:
            raise ConfigError(
                "scores.rescore is given, but scores are exact already; give scores.rank too, or "
                "neither."
            )
        return
    if scores.per_token == "all":
        raise ConfigError(
            "scores.per_token is all, but an index keeps no positions; set it to top, for those "
            "of the listed sequences, or leave the index out."
        )
    if scores.rescore == 0 and scores.per_token != "none":
        raise ConfigError(
            "scores.rescore is 0, so all scores are the index's, which keeps no positions; set "
            "scores.per_token: none, or score some sequences again."
        )


def with_rescoring(scores: ScoresConfig, num_scored: int) -> ScoresConfig:
    """The scores of an index with what null means for `rescore`.

    Args:
        scores: The scores that are asked for.
        num_scored: How many sequences are scored.
    """
    if scores.rescore is not None:
        return scores
    listed = max(scores.top_k or DEFAULT_TOP_K, scores.bottom_k or 0)
    return dataclasses.replace(scores, rescore=min(num_scored, max(DEFAULT_RESCORE, listed)))


def require_refinable(scores: ScoresConfig, refine: RefineConfig) -> None:
    """Refuses scores that are not defined, or not computed, with refined query gradients.

    Raises:
        ConfigError: If they are asked for.
    """
    if not refine.is_on:
        return
    given, advice = None, "none"
    if scores.normalize != "none":
        given = f"scores.normalize is {scores.normalize}"
    elif scores.self_influence:
        given, advice = "scores.self_influence is true", "false"
    if given is not None:
        field_name = given.partition(" ")[0]
        raise ConfigError(
            f"{given}, but refine.method is {refine.method}: norms of training gradients are in "
            "the factors' (F + λ)⁻¹, and refined scores in another inner product, so that the "
            f"quotient has no meaning; set {field_name}: {advice}, or refine.method: none."
        )
    if scores.shard not in ("auto", 1):
        raise ConfigError(
            f"scores.shard is {scores.shard}, but refine.method is {refine.method}, for which "
            "every worker holds all factors and query gradients; set scores.shard: 1, or "
            "refine.method: none."
        )


@dataclass(kw_only=True)
class QueryConfig:
    """A whole run of `query`.

    Args:
        factors: Directory of the factor store.
        index: Directory of a gradient index of these factors, which is scanned in the place of the
            training data; null: the data are run through the model.
        queries: A .jsonl file of queries; each line has "prompt" and "completion", or "text", or
            the "messages" of a chat; the completion, or the last message, may be "against" another.
            Lines with the same "group" are summed into one query.
        model: Which model; by default the one that the factors were fitted for.
        data: Which training sequences; by default those of the index, or without one those that
            the factors were fitted on.
        damping: The damping λ.
        scores: Which scores.
        refine: Whether query gradients are refined beyond the factors' solution.
        batch_tokens: Most tokens in a worker's step, padding included; on a CPU at most 1024 a
            thread.
        output: Directory of the results.
    """

    factors: str | None = None
    index: str | None = None
    queries: str | None = None
    model: QueryModelConfig = field(default_factory=QueryModelConfig)
    data: QueryDataConfig = field(default_factory=QueryDataConfig)
    damping: DampingConfig = field(default_factory=DampingConfig)
    scores: ScoresConfig = field(default_factory=ScoresConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    batch_tokens: int = 4096
    output: str | None = None

    def __post_init__(self) -> None:
        require_positive("batch_tokens", self.batch_tokens)
        require_given({name: getattr(self, name) for name in ("factors", "queries", "output")})
        for name in ("factors", "queries", "output", "index"):
            if (path := getattr(self, name)) is not None:
                setattr(self, name, os.path.expanduser(path))
        require_rescorable(self.scores, from_index=self.index is not None)
        require_refinable(self.scores, self.refine)

    def as_dict(self) -> dict[str, Any]:
        """The whole configuration as plain nested dictionaries."""
        return dataclasses.asdict(self)
