"""The configuration of a run: plain dataclasses that check themselves.

Every field has one meaning, one default and one place. `ConfigError` is raised for a value that
cannot be meant; types are checked by the command line's parser.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from ekfac_dist.errors import ConfigError

T = TypeVar("T")

Dtype = Literal["float64", "float32", "bfloat16", "float16", "auto"]
Quantization = Literal["8bit", "4bit"]
Labels = Literal["sampled", "data"]
DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
Refit = Literal["per_sequence", "per_token", "none"]
Normalize = Literal["none", "cosine", "relatif_l", "relatif_theta"]
PerToken = Literal["none", "top", "all"]

DEFAULT_RANK = 32
DEFAULT_TOP_K = 20


def _require_choice(name: str, value: object, choices: Iterable[str]) -> None:
    choices = tuple(choices)
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(choices)}.")


def require_positive(name: str, value: object) -> None:
    """Refuses what is no whole number of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of 1 or more.")


def _require_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of 0 or more.")


def require_pass_settings(batch_tokens: object, save_minutes: object) -> None:
    """Refuses a token budget, or an interval between saved states, that is out of range.

    Raises:
        ConfigError: If one is.
    """
    require_positive("batch_tokens", batch_tokens)
    is_interval = isinstance(save_minutes, (int, float)) and 0 <= save_minutes < math.inf
    if save_minutes is not None and not is_interval:
        raise ConfigError(
            f"save_minutes is {save_minutes!r}; it must be a finite number of 0 or more, or null."
        )


def _require_given(values: Mapping[str, object]) -> None:
    for name, value in values.items():
        if not value:
            raise ConfigError(f"{name} is not given; set it in the YAML file or as --{name}.")


@dataclass(kw_only=True)
class ModelConfig:
    """Which model, and which of its modules.

    Args:
        name: Hub id or local directory of a causal language model with safetensors weights.
        revision: Hub revision (branch, tag or commit).
        dtype: Of weights and activations; auto: that of the stored weights.
        modules: Globs of names of modules to track, such as '*.mlp.*'; null: every MLP linear,
            or an adapter's matrices on them.
        adapter: Hub id or local directory of a PEFT LoRA adapter for the model.
        merge_adapter: Merge the adapter and track the merged weights, not its own matrices.
        quantization: Load linear weights in 8bit or 4bit (bitsandbytes); null: as stored.
        device_map: How Accelerate spreads a single worker's model over devices; null: all on one.
        trust_remote_code: Run Python code that comes with the model.
    """

    name: str | None = None
    revision: str | None = None
    dtype: Dtype = "float32"
    modules: list[str] | None = None
    adapter: str | None = None
    merge_adapter: bool = False
    quantization: Quantization | None = None
    device_map: DeviceMap | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.quantization is not None:
            _require_choice("model.quantization", self.quantization, ("8bit", "4bit"))
        if self.device_map is not None:
            _require_choice("model.device_map", self.device_map, get_args(DeviceMap))
        _require_choice(
            "model.dtype", self.dtype, ("float64", "float32", "bfloat16", "float16", "auto")
        )
        if self.modules is not None and not self.modules:
            raise ConfigError(
                "model.modules is an empty list; give at least one glob, or null for every MLP "
                "linear."
            )
        if self.merge_adapter and self.adapter is None:
            raise ConfigError("model.merge_adapter is given without model.adapter; give both.")


@dataclass(kw_only=True)
class DataConfig:
    """Which text, and how much of it.

    Args:
        source: A .jsonl, .json, .csv, .parquet or .txt file, a saved `datasets` directory, or a
            hub id.
        subset: Which subset of a hub data set that has several.
        split: Which split of the source.
        text: Column that holds the text.
        prompt: Column of a text that comes before it and whose tokens carry no label.
        max_tokens: Longer sequences are cut to this many tokens, and counted.
        max_sequences: Use only the first so many sequences; null: all.
    """

    source: str | None = None
    subset: str | None = None
    split: str = "train"
    text: str = "text"
    prompt: str | None = None
    max_tokens: int = 512
    max_sequences: int | None = None

    def __post_init__(self) -> None:
        require_positive("data.max_tokens", self.max_tokens)
        if self.max_tokens < 2:
            raise ConfigError(
                "data.max_tokens is 1; a sequence needs 2 tokens or more, one to read and one to "
                "predict."
            )
        if self.max_sequences is not None:
            require_positive("data.max_sequences", self.max_sequences)


@dataclass(kw_only=True)
class FactorsConfig:
    """What is fitted.

    Args:
        labels: sampled: from the model's own softmax (true Fisher); data: the data's own labels
            (empirical Fisher).
        seed: Seed of the sampled labels.
        refit: Kind of Λ: per_sequence; per_token (faster, approximate); or none (K-FAC).
        accumulate: Precision of every running sum, float32 or float64.
        eigen: Who decomposes factors: worker 0 alone, or every worker a share (sharded).
        partitions: Groups of modules, with a pair of passes over the data each: more of them take
            less memory and more time; auto: the fewest that fit into memory.
        blocks: Diagonal blocks of each factor, for very large dimensions; 1: factors are whole.
        keep_covariance: Store the raw covariance sums too; they about double the disk.
    """

    labels: Labels = "sampled"
    seed: int = 0
    refit: Refit = "per_sequence"
    accumulate: Literal["float32", "float64"] = "float32"
    eigen: Literal["rank0", "sharded"] = "rank0"
    partitions: int | Literal["auto"] = "auto"
    blocks: int = 1
    keep_covariance: bool = True

    def __post_init__(self) -> None:
        _require_choice("factors.labels", self.labels, ("sampled", "data"))
        _require_choice("factors.refit", self.refit, ("per_sequence", "per_token", "none"))
        _require_choice("factors.accumulate", self.accumulate, ("float32", "float64"))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"factors.seed is {self.seed!r}; it must be a whole number.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"factors.seed is {self.seed}; it must be from 0 to 2^63 - 1.")
        if self.partitions != "auto":
            require_positive("factors.partitions", self.partitions)
        _require_choice("factors.eigen", self.eigen, ("rank0", "sharded"))
        require_positive("factors.blocks", self.blocks)


@dataclass(kw_only=True)
class EstimateConfig:
    """A whole run of `estimate`.

    Args:
        model: Which model.
        data: Which text.
        factors: What is fitted.
        batch_tokens: Most tokens in a batch, per worker and step, padding included; on a CPU not
            more than 1024 a thread.
        save_minutes: Minutes between savings of an unfinished pass's sums; 0: after every step;
            null: never.
        output: Directory of the factor store.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    factors: FactorsConfig = field(default_factory=FactorsConfig)
    batch_tokens: int = 4096
    save_minutes: float | None = 10.0
    output: str | None = None

    def __post_init__(self) -> None:
        self._check()
        names = {"model.name": self.model.name, "data.source": self.data.source}
        _require_given({**names, "output": self.output})

    def _check(self) -> None:
        require_pass_settings(self.batch_tokens, self.save_minutes)
        # A shell expands ~ only where it sees it: not in a YAML file, nor behind --output=.
        self.model.name = os.path.expanduser(self.model.name or "")
        self.data.source = os.path.expanduser(self.data.source or "")
        self.output = os.path.expanduser(self.output or "")

    def as_dict(self) -> dict[str, Any]:
        """The whole configuration as plain nested dictionaries."""
        return dataclasses.asdict(self)


@dataclass(kw_only=True)
class PlanConfig(EstimateConfig):
    """What `plan` looks into: a run of `estimate`, and the machines that it would have.

    Args:
        workers: Number of workers; null: one for each GPU of this machine, or one.
        device_memory: Memory of each worker's GPU, such as 80GiB; null: what is free on this
            machine.
        fsdp: Plan for weights that are sharded over the workers, as with
            launch/accelerate/fsdp.yaml.
        sequences: Number of sequences in the data; null: data.max_sequences, or 1000.
        gflops: Speed of each worker at products of float32 matrices, in GFLOP/s; null: measured on
            this machine.
    """

    workers: int | None = None
    device_memory: str | None = None
    fsdp: bool = False
    sequences: int | None = None
    gflops: float | None = None

    def __post_init__(self) -> None:
        self._check()
        _require_given({"model.name": self.model.name})
        for name in ("workers", "sequences"):
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name))
        if self.gflops is not None and not 0 < self.gflops < math.inf:
            raise ConfigError(f"gflops is {self.gflops!r}; it must be a finite number above 0.")
        self.memory_bytes  # noqa: B018 - refused now, if it is to be

    @property
    def memory_bytes(self) -> int | None:
        """`device_memory` as a number."""
        if self.device_memory is None:
            return None
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?) *([kMGT]?)(i?)B?", self.device_memory.strip())
        if not found or not float(found[1]):
            raise ConfigError(
                f"device_memory is {self.device_memory!r}; give a number above 0 and its unit, "
                "such as 80GiB or 24GB."
            )
        number, unit, binary = found.groups()
        return int(float(number) * (1024 if binary else 1000) ** " kMGT".index(unit or " "))


@dataclass(kw_only=True)
class QueryModelConfig:
    """Which model answers; what is null is as it was when the factors were fitted.

    Args:
        name: Hub id or local directory.
        revision: Hub revision (branch, tag or commit).
        dtype: Of weights and activations: float64, float32, bfloat16, float16 or auto.
        adapter: Hub id or local directory of a PEFT LoRA adapter.
        quantization: Quantise linear weights to 8bit or 4bit when they are loaded.
        device_map: How Accelerate spreads the model of a single worker over its devices; null: all
            on one device, however it was fitted.
        trust_remote_code: Run Python code that comes with the model; never taken from a store.
        allow_changes: Answer even with a model that differs from the fitted one outside the
            tracked modules; the results say in what.
    """

    name: str | None = None
    revision: str | None = None
    dtype: Dtype | None = None
    adapter: str | None = None
    quantization: Quantization | None = None
    device_map: DeviceMap | None = None
    trust_remote_code: bool = False
    allow_changes: bool = False

    def over(self, fitted: Mapping[str, Any]) -> ModelConfig:
        """What is given, over what the factors were fitted with."""
        fitted = {**fitted, "device_map": None}  # it is of the machine, not of the model
        given = _given(self)
        del given["allow_changes"]  # it is of the comparison, not of the model
        model = _over(ModelConfig, fitted, given)
        _require_given({"model.name": model.name})
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
        max_tokens: Longer sequences are cut to this many tokens.
        max_sequences: Use only the first so many sequences.
    """

    source: str | None = None
    subset: str | None = None
    split: str | None = None
    text: str | None = None
    prompt: str | None = None
    max_tokens: int | None = None
    max_sequences: int | None = None

    def over(self, fitted: Mapping[str, Any]) -> DataConfig:
        """What is given, over what the factors were fitted on, or over the defaults."""
        data = _over(DataConfig, fitted if self.source is None else {}, _given(self))
        _require_given({"data.source": data.source})
        data.source = os.path.expanduser(data.source or "")
        return data


def _over(config_class: type[T], fitted: Mapping[str, Any], given: Mapping[str, Any]) -> T:
    unknown = [name for name in fitted if name not in field_types(config_class)]
    if unknown:
        raise ConfigError(
            f"The factors' manifest has a configuration with {', '.join(map(str, unknown))}, which "
            "this version does not know; use the version that fitted them, or fit them again."
        )
    return config_class(**{**fitted, **given})


def _given(config: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if value is not None}


@dataclass(kw_only=True)
class DampingConfig:
    """The damping λ of each module.

    Args:
        value: λ of every module: a multiple of mean(Λ) of the module or, with relative false, λ
            itself.
        relative: Whether values are multiples of the module's mean(Λ).
        modules: Other values for some modules, by name or glob; a name goes before globs, and the
            first glob that matches before the others.
    """

    value: float = 0.1
    relative: bool = True
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
        per_module: Store the scores of each module too.
        per_layer: Store the scores of each layer too.
        self_influence: Store each training sequence's influence on itself.
        low_rank: Whether the scan of the data uses query gradients of low rank, which take less
            memory and give approximate scores; null: only if a rank is given.
        rank: The rank of those gradients; null: 32.
        rescore: After a scan of low rank, score so many sequences at either end of it again,
            exactly, and as many spread evenly over the data, to tell how good the scan was.
        candidates: Score only these sequences: a list of their indices in the data, from 0, or a
            file of them (JSON, or an index in each line).
        training_size: Number of sequences that the model was trained on, if it was trained on this
            data: then scores are given in nats too, to first order; null: no nats.
        query_memory_gb: Each worker's budget for query gradients, in GB (10⁹ bytes); queries that
            do not fit are answered in several blocks, with one scan of the data each.
    """

    normalize: Normalize = "none"
    top_k: int | None = None
    bottom_k: int | None = None
    per_token: PerToken = "top"
    per_module: bool = False
    per_layer: bool = False
    self_influence: bool = False
    low_rank: bool | None = None
    rank: int | None = None
    rescore: int = 0
    candidates: list[int] | str | None = None
    training_size: int | None = None
    query_memory_gb: float = 4.0

    def __post_init__(self) -> None:
        _require_choice("scores.normalize", self.normalize, get_args(Normalize))
        _require_choice("scores.per_token", self.per_token, get_args(PerToken))
        for name in ("top_k", "rank", "training_size"):
            value = getattr(self, name)
            if value is not None:
                require_positive(f"scores.{name}", value)
        if self.bottom_k is not None:
            _require_count("scores.bottom_k", self.bottom_k)
        _require_count("scores.rescore", self.rescore)
        if self.rank is not None and self.low_rank is False:
            raise ConfigError(
                f"scores.rank is {self.rank}, but scores.low_rank is false; give one of them."
            )
        if self.rescore and self.effective_rank is None:
            raise ConfigError(
                "scores.rescore is given, but scores are exact already; give scores.rank too, or "
                "neither."
            )
        memory = self.query_memory_gb
        if not isinstance(memory, (int, float)) or not 0 < memory < math.inf:
            raise ConfigError(
                f"scores.query_memory_gb is {memory!r}; it must be a finite number above 0."
            )

    @property
    def effective_rank(self) -> int | None:
        """The rank of the scan's query gradients; None: they are whole."""
        return self.rank or (DEFAULT_RANK if self.low_rank else None)


@dataclass(kw_only=True)
class QueryConfig:
    """A whole run of `query`.

    Args:
        factors: Directory of the factor store.
        queries: A .jsonl file of queries; each line has "prompt" and "completion", or "text".
            Lines with the same "group" are summed into one query.
        model: Which model; by default the one that the factors were fitted for.
        data: Which training sequences; by default those that the factors were fitted on.
        damping: The damping λ.
        scores: Which scores.
        batch_tokens: Largest number of tokens in a batch, per worker and step, padding included.
        output: Directory of the results.
    """

    factors: str | None = None
    queries: str | None = None
    model: QueryModelConfig = field(default_factory=QueryModelConfig)
    data: QueryDataConfig = field(default_factory=QueryDataConfig)
    damping: DampingConfig = field(default_factory=DampingConfig)
    scores: ScoresConfig = field(default_factory=ScoresConfig)
    batch_tokens: int = 4096
    output: str | None = None

    def __post_init__(self) -> None:
        require_positive("batch_tokens", self.batch_tokens)
        _require_given({name: getattr(self, name) for name in ("factors", "queries", "output")})
        for name in ("factors", "queries", "output"):
            setattr(self, name, os.path.expanduser(getattr(self, name)))

    def as_dict(self) -> dict[str, Any]:
        """The whole configuration as plain nested dictionaries."""
        return dataclasses.asdict(self)


def dotted(
    nested: Any, prefix: str = "", is_group: Callable[[str], bool] = lambda name: True
) -> dict[str, Any]:
    """A nested mapping as one level of dotted names; {"a": {"b": 1}} becomes {"a.b": 1}.

    Args:
        nested: The mapping; anything else is a value itself.
        prefix: What names begin with, a dot at its end.
        is_group: Whether a mapping of some dotted name is a group of fields, and not a value.
    """
    name = prefix.removesuffix(".")
    if not isinstance(nested, Mapping) or not (name == "" or is_group(name)):
        return {name: nested}
    values: dict[str, Any] = {}
    for key, value in nested.items():
        values |= dotted(value, f"{prefix}{key}.", is_group)
    return values


def field_types(config_class: type) -> dict[str, Any]:
    """The type of every field of a configuration class that is no group, by its dotted name."""
    return dotted(_nested_types(config_class))


def _nested_types(config_class: type) -> dict[str, Any]:
    return {
        f.name: _nested_types(f.type)
        if isinstance(f.type, type) and dataclasses.is_dataclass(f.type)
        else f.type
        for f in dataclasses.fields(config_class)
    }
