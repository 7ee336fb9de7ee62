"""The settings of a fit, whether they come from a configuration or from Python arguments."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ekfac_dist.config import (
    Checkpointing,
    DataConfig,
    EstimateConfig,
    FactorsConfig,
    ModelConfig,
    require_given,
    require_pass_settings,
)


@dataclass(frozen=True)
class FitSettings:
    """How factors are fitted, once model and data are loaded.

    Attributes:
        modules: Globs of the names of tracked modules; None for every MLP linear.
        factors: Labels, precision, eigenvalue correction and partitions.
        gradient_checkpointing: Whether layers are computed again in the backward, or "auto".
        batch_tokens: Token budget of a batch, per worker and step.
        save_minutes: How often each worker saves the state of a pass; None for never.
        recorded: The whole configuration as the manifest keeps it, in nested dictionaries.
    """

    modules: Sequence[str] | None
    factors: FactorsConfig
    gradient_checkpointing: Checkpointing
    batch_tokens: int
    save_minutes: float | None
    recorded: Mapping[str, Any]

    @classmethod
    def of_config(cls, config: EstimateConfig) -> "FitSettings":
        """The settings of a configuration."""
        return cls(
            config.model.modules,
            config.factors,
            config.model.gradient_checkpointing,
            config.batch_tokens,
            config.save_minutes,
            config.as_dict(),
        )

    @classmethod
    def of_arguments(
        cls,
        model: ModelConfig,
        data: DataConfig,
        factors: FactorsConfig,
        *,
        batch_tokens: int,
        save_minutes: float | None,
        output: str | None,
    ) -> "FitSettings":
        """The settings of a call from Python; recorded in the form of a configuration.

        Args:
            model: What is known of the caller's model: a name and the chosen modules.
            data: What is known of the caller's data: the container's type and the longest example.
            factors: Labels, precision, eigenvalue correction and partitions.
            batch_tokens: Token budget of a batch.
            save_minutes: How often each worker saves the state of a pass.
            output: Directory of the store; None if the factors stay in memory.

        Raises:
            ConfigError: If a value is out of range, or the output is an empty text.
        """
        require_pass_settings(batch_tokens, save_minutes)
        if output is not None:
            require_given({"output": output})
        recorded = {
            "model": dataclasses.asdict(model),
            "data": dataclasses.asdict(data),
            "factors": dataclasses.asdict(factors),
            "batch_tokens": batch_tokens,
            "save_minutes": save_minutes,
            "output": "(memory)" if output is None else os.path.expanduser(output),
        }
        return cls(
            model.modules,
            factors,
            model.gradient_checkpointing,
            batch_tokens,
            save_minutes,
            recorded,
        )
