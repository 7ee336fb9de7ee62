"""The configuration of `estimate`."""

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ekfac_dist.config.checks import (
    require_checkpointing,
    require_choice,
    require_given,
    require_pass_settings,
    require_positive,
    require_template,
    template_columns,
)
from ekfac_dist.errors import ConfigError

Dtype = Literal["float64", "float32", "bfloat16", "float16", "auto"]
Quantization = Literal["8bit", "4bit"]
Labels = Literal["sampled", "data"]
DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
Checkpointing = bool | Literal["auto"]
Refit = Literal["per_sequence", "per_token", "none"]
Eigen = Literal["auto", "rank0", "sharded"]


@dataclass(kw_only=True)
class ModelConfig:
    """Which model, and which of its modules.

    Args:
        name: Hub id or local directory of a causal language model with safetensors weights.
        revision: Hub revision (branch, tag or commit).
        gguf: Name of a GGUF file there; null: safetensors.
        dtype: Of weights and activations; auto: that of the stored weights.
        modules: Globs of names of modules to track, such as '*.mlp.*'; null: every MLP linear,
            or an adapter's matrices on them.
        adapter: Hub id or local directory of a PEFT LoRA adapter for the model.
        merge_adapter: Merge the adapter and track the merged weights, not its own matrices.
        quantization: Load linear weights in 8bit or 4bit (bitsandbytes); null: as stored.
        device_map: How Accelerate spreads a single worker's model over devices; null: all on one.
        gradient_checkpointing: Compute each layer again in the backward instead of holding its
            activations; auto: where they would not fit.
        trust_remote_code: Run Python code that comes with the model.
    """

    name: str | None = None
    revision: str | None = None
    gguf: str | None = None
    dtype: Dtype = "float32"
    modules: list[str] | None = None
    adapter: str | None = None
    merge_adapter: bool = False
    quantization: Quantization | None = None
    device_map: DeviceMap | None = None
    gradient_checkpointing: Checkpointing = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.quantization is not None:
            require_choice("model.quantization", self.quantization, ("8bit", "4bit"))
        if self.device_map is not None:
            require_choice("model.device_map", self.device_map, get_args(DeviceMap))
        require_checkpointing("model.gradient_checkpointing", self.gradient_checkpointing)
        require_choice(
            "model.dtype", self.dtype, ("float64", "float32", "bfloat16", "float16", "auto")
        )
        if self.modules is not None and not self.modules:
            raise ConfigError(
                "model.modules is an empty list; give at least one glob, or null for every MLP "
                "linear."
            )
        if self.gguf is not None:
            self._check_gguf(self.gguf)
        if self.merge_adapter and self.adapter is None:
            raise ConfigError("model.merge_adapter is given without model.adapter; give both.")

    def _check_gguf(self, name: str) -> None:
        if not name.lower().endswith(".gguf"):
            raise ConfigError(
                f"model.gguf is {name!r}; it is the name of a .gguf file in model.name."
            )
        if os.path.isabs(name) or ".." in name.split("/"):
            raise ConfigError(
                f"model.gguf is {name!r}; give the file's name, and its directory as model.name."
            )
        if self.quantization is not None:
            raise ConfigError(
                "model.gguf and model.quantization are both given; a GGUF file's weights are "
                "dequantised when they are read. Give one of the two."
            )


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
        template: Text of several columns, as '{title}: {text}'.
        messages: Column of chats, whose last turns carry labels.
        tokens: Column of token ids, for data that is tokenised.
        label_mask: Column with a 0 for each token without label.
        documents: Column of where the documents in a row begin.
        max_tokens: Longer sequences are cut to this many tokens, and counted.
        window: Or a window of max_tokens begins every so many.
        max_sequences: Use only the first so many rows; null: all.
    """

    source: str | None = None
    subset: str | None = None
    split: str = "train"
    text: str = "text"
    prompt: str | None = None
    template: str | None = None
    messages: str | None = None
    tokens: str | None = None
    label_mask: str | None = None
    documents: str | None = None
    max_tokens: int = 512
    window: int | None = None
    max_sequences: int | None = None

    def __post_init__(self) -> None:
        require_positive("data.max_tokens", self.max_tokens)
        if self.max_tokens < 2:
            raise ConfigError(
                "data.max_tokens is 1; a sequence needs 2 tokens or more, one to read and one to "
                "predict."
            )
        if self.window is not None:
            require_positive("data.window", self.window)
            if self.window >= self.max_tokens:
                raise ConfigError(
                    f"data.window is {self.window} and data.max_tokens {self.max_tokens}; the "
                    "first token of a window is not predicted in it, so windows have to overlap: "
                    f"give {self.max_tokens - 1} or less."
                )
        if self.max_sequences is not None:
            require_positive("data.max_sequences", self.max_sequences)
        self._check_columns()

    def _check_columns(self) -> None:
        kinds = {name: getattr(self, name) for name in ("template", "messages", "tokens")}
        given = [name for name, value in kinds.items() if value is not None]
        if len(given) > 1:
            raise ConfigError(
                f"data.{given[0]} and data.{given[1]} are both given; data is text, chats or "
                "tokens: give one of them."
            )
        if self.prompt is not None and given in (["messages"], ["tokens"]):
            raise ConfigError(
                f"data.prompt and data.{given[0]} are both given; a prompt comes before text. Give "
                "one of them."
            )
        for name in ("label_mask", "documents"):
            if getattr(self, name) is not None and self.tokens is None:
                raise ConfigError(
                    f"data.{name} is given without data.tokens; give the column of the tokens too."
                )
        if self.template is not None:
            require_template("data.template", self.template)

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        if self.tokens is not None:
            names = [self.tokens, self.label_mask, self.documents]
        elif self.messages is not None:
            names = [self.messages]
        elif self.template is not None:
            names = [*template_columns(self.template), self.prompt]
        else:
            names = [self.text, self.prompt]
        return list(dict.fromkeys(name for name in names if name is not None))


@dataclass(kw_only=True)
class FactorsConfig:
    """What is fitted.

    Args:
        labels: sampled: from the model's own softmax (true Fisher); data: the data's own labels
            (empirical Fisher).
        seed: Seed of the sampled labels.
        refit: Kind of Λ: per_sequence; per_token (faster, approximate); or none (K-FAC).
        accumulate: Precision of every running sum.
        eigen: Who decomposes factors: worker 0 (rank0) or each a share (sharded); auto: sharded if
            shard is above 1.
        shard: Number of workers that share out one copy of the factors; auto: 1 where one copy fits
            a worker, else the fewest that fit one pair of passes.
        partitions: Groups of modules, with a pair of passes over the data each: more of them take
            less memory and more time; auto: the fewest that fit into memory.
        blocks: Diagonal blocks of each factor, for very large dimensions; 1: factors are whole.
        keep_covariance: Store the raw covariance sums too; they about double the disk.
    """

    labels: Labels = "sampled"
    seed: int = 0
    refit: Refit = "per_sequence"
    accumulate: Literal["float32", "float64"] = "float32"
    eigen: Eigen = "auto"
    shard: int | Literal["auto"] = "auto"
    partitions: int | Literal["auto"] = "auto"
    blocks: int = 1
    keep_covariance: bool = True

    def __post_init__(self) -> None:
        require_choice("factors.labels", self.labels, ("sampled", "data"))
        require_choice("factors.refit", self.refit, ("per_sequence", "per_token", "none"))
        require_choice("factors.accumulate", self.accumulate, ("float32", "float64"))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"factors.seed is {self.seed!r}; it must be a whole number.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"factors.seed is {self.seed}; it must be from 0 to 2^63 - 1.")
        if self.partitions != "auto":
            require_positive("factors.partitions", self.partitions)
        if self.shard != "auto":
            require_positive("factors.shard", self.shard)
        require_choice("factors.eigen", self.eigen, get_args(Eigen))
        require_positive("factors.blocks", self.blocks)

    def shares_decompositions(self, shard: int) -> bool:
        """Whether every worker decomposes a share of the factors, instead of worker 0 all.

        Args:
            shard: Number of workers among which one copy of the factors is shared out.
        """
        return self.eigen == "sharded" or (self.eigen == "auto" and shard > 1)


@dataclass(kw_only=True)
class EstimateConfig:
    """A whole run of `estimate`.

    Args:
        model: Which model.
        data: Which text.
        factors: What is fitted.
        batch_tokens: Most tokens in a worker's step, padding included; fewer if memory is short; on
            a CPU at most 1024 a thread.
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
        require_given({**names, "output": self.output})

    def _check(self) -> None:
        require_pass_settings(self.batch_tokens, self.save_minutes)
        # A shell expands ~ only where it sees it: not in a YAML file, nor behind --output=.
        self.model.name = os.path.expanduser(self.model.name or "")
        self.data.source = os.path.expanduser(self.data.source or "")
        self.output = os.path.expanduser(self.output or "")

    def as_dict(self) -> dict[str, Any]:
        """The whole configuration as plain nested dictionaries."""
        return dataclasses.asdict(self)
