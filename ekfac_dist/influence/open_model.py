"""Model, factors and index of a session: read, and checked against each other, once."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from ekfac_dist.config import (
    DataConfig,
    ModelConfig,
    ServeConfig,
)
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.errors import StoreError
from ekfac_dist.factors.comparison import check_model, require_fitted_task
from ekfac_dist.factors.factors import Factors
from ekfac_dist.factors.opening import load_factors
from ekfac_dist.influence.index.reader import GradientIndex
from ekfac_dist.influence.names import named_by
from ekfac_dist.models.capture.prepare import prepared
from ekfac_dist.models.capture.tasks import CAUSAL_LM
from ekfac_dist.models.load.on_workers import load, require_same_model
from ekfac_dist.models.load.pretrained import load_tokenizer
from ekfac_dist.models.modules import TrackedModule, layer_name
from ekfac_dist.models.sharding import agreeing
from ekfac_dist.passes.sequences import (
    check_sequences,
    load_with_examples,
)
from ekfac_dist.runtime.logs import log_on_main
from ekfac_dist.runtime.memory import as_text
from ekfac_dist.runtime.processes import World


@contextmanager
def opened_model(config: ServeConfig, world: World) -> Iterator["OpenModel"]:
    """Opens model, factors and index; a collective.

    Args:
        config: The service's configuration.
        world: The workers.

    Raises:
        UserError: If the user can correct the cause; on every worker alike.
    """
    store, path = str(config.factors), str(config.index)
    with world.agree():
        factors = load_factors(store)
        require_fitted_task(store, factors, CAUSAL_LM)
        index = GradientIndex(path, factors)
        model_config = config.model.over(factors.manifest["config"]["model"])
        data_config = index.data_config(config.data)
    with named_by(store, "model.name", model_config.name, config.model.name):
        tokenizer, tokenizer_print = world.main_first(lambda: load_tokenizer(model_config))
    with named_by(path, "data.source", data_config.source, config.data.source):
        train, examples = load_with_examples(data_config, tokenizer, tokenizer_print, world)
    model = load(model_config, world)
    with prepared(model), index.kept_open():
        with agreeing(world, model, StoreError):
            allowed = config.model.allow_changes
            comparison = check_model(store, factors, model, allow_changes=allowed)
        with world.agree():
            check_sequences(model, train, "set data.max_tokens to {context} or less")
            index.require_data(train)
            index.require_model(comparison.fingerprints.whole)
            index.check_shards(world.rank, world.size)
        world.require_same("data, by fingerprint,", train.fingerprint)
        world.require_same("factors, by fingerprint,", factors.fingerprint)
        world.require_same("index, by fingerprint,", index.fingerprint)
        require_same_model(model, comparison.fingerprints, world)
        for sentence in (*comparison.differs, *comparison.not_compared):
            log_on_main(world, f"model         {sentence}")
        log_on_main(
            world,
            f"index         {len(index)} sequences, rank {index.rank}, {as_text(index.num_bytes)}",
        )
        yield OpenModel(
            config=config,
            factors=factors,
            index=index,
            model=model,
            model_config=model_config,
            data_config=data_config,
            tokenizer=tokenizer,
            train=train,
            examples=examples,
            whole=comparison.fingerprints.whole,
            differs=comparison.differs,
            not_compared=comparison.not_compared,
        )


@dataclass(frozen=True)
class OpenModel:
    """What a session holds open; attributes as of `Answer`."""

    config: ServeConfig
    factors: Factors
    index: GradientIndex
    model: torch.nn.Module
    model_config: ModelConfig
    data_config: DataConfig
    tokenizer: Any
    train: Sequences
    examples: Dataset
    whole: str
    differs: tuple[str, ...]
    not_compared: tuple[str, ...]

    @property
    def dtype(self) -> str:
        """The model's dtype, in words."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    def info(self, modules: Iterable[TrackedModule]) -> dict[str, Any]:
        """What is open, for people; see `Session.info`.

        Args:
            modules: The tracked modules, in model order.
        """
        fitted, index = self.factors.manifest, self.index
        names = [module.name for module in modules]
        return {
            "model": {
                "name": self.model_config.name,
                "dtype": self.dtype,
                "whole": self.whole,
                "chats": bool(getattr(self.tokenizer, "chat_template", None)),
            },
            "factors": {
                "path": str(self.config.factors),
                "num_sequences": fitted["data"]["num_sequences"],
                "labels": fitted["fisher"]["labels"],
                "refit": fitted["fisher"]["refit"],
            },
            "index": {
                "path": str(index.path),
                "rank": index.rank,
                "dtype": index.manifest["index"]["dtype"],
                "num_sequences": len(index),
                "bytes": index.num_bytes,
            },
            "layers": list(dict.fromkeys(map(layer_name, names))),
            "modules": names,
            "damping": vars(self.config.damping),
        }
