"""The configuration of `index`."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ekfac_dist.config.checks import require_choice, require_given, require_positive
from ekfac_dist.config.query import QueryDataConfig, QueryModelConfig
from ekfac_dist.errors import ConfigError

IndexDtype = Literal["bfloat16", "float32", "float64"]

DEFAULT_RANK = 8


@dataclass(kw_only=True)
class KeptConfig:
    """How an index keeps gradients.

    Args:
        rank: A sequence's gradient of a module is kept as a sum of so many outer products, or of as
            many as it has if those are fewer; null: 8, or with --add as the index has it.
        dtype: Of what is kept: bfloat16, float32 or float64; null: bfloat16, or with --add as the
            index has it.
    """

    rank: int | None = None
    dtype: IndexDtype | None = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            require_positive("index.rank", self.rank)
        if self.dtype is not None:
            require_choice("index.dtype", self.dtype, get_args(IndexDtype))

    def over(self, before: Mapping[str, Any] | None) -> "Kept":
        """What null means filled in.

        Args:
            before: How the index that sequences are added to keeps them; None: there is none.

        Raises:
            ConfigError: If that is another way.
        """
        for name, value in vars(self).items():
            if before is not None and value is not None and value != before[name]:
                raise ConfigError(
                    f"index.{name} is {value}, but the index that sequences are added to has "
                    f"{before[name]}; leave index.{name} out, or make another index."
                )
        if before is not None:
            return Kept(before["rank"], before["dtype"])
        return Kept(self.rank or DEFAULT_RANK, self.dtype or "bfloat16")


@dataclass(frozen=True)
class Kept:
    """How an index keeps gradients: as `KeptConfig`, without null.

    Attributes:
        rank: Most outer products of a gradient in a module.
        dtype: Of what is kept.
    """

    rank: int
    dtype: IndexDtype


@dataclass(kw_only=True)
class IndexConfig:
    """A whole run of `index`.

    Args:
        factors: Directory of the factor store whose eigenbasis gradients are kept in.
        model: Which model; by default the one that the factors were fitted for.
        data: Which training sequences; by default those that the factors were fitted on, or, with
            --add, those of the index.
        index: How gradients are kept.
        batch_tokens: Most tokens in a worker's step, padding included; on a CPU at most 1024 a
            thread.
        output: Directory of the index.
    """

    factors: str | None = None
    model: QueryModelConfig = field(default_factory=QueryModelConfig)
    data: QueryDataConfig = field(default_factory=QueryDataConfig)
    index: KeptConfig = field(default_factory=KeptConfig)
    batch_tokens: int = 4096
    output: str | None = None

    def __post_init__(self) -> None:
        require_positive("batch_tokens", self.batch_tokens)
        require_given({name: getattr(self, name) for name in ("factors", "output")})
        for name in ("factors", "output"):
            setattr(self, name, os.path.expanduser(getattr(self, name)))

    def as_dict(self) -> dict[str, Any]:
        """The whole configuration as plain nested dictionaries."""
        return dataclasses.asdict(self)
