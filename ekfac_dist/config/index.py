"""The configuration of `index`."""

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ekfac_dist.config.checks import require_choice, require_given, require_positive
from ekfac_dist.config.query import QueryDataConfig, QueryModelConfig

IndexDtype = Literal["bfloat16", "float32", "float64"]


@dataclass(kw_only=True)
class KeptConfig:
    """How an index keeps gradients.

    Args:
        rank: A sequence's gradient of a module is kept as a sum of so many outer products, or of as
            many as it has if those are fewer.
        dtype: Of what is kept: bfloat16, float32 or float64.
    """

    rank: int = 1
    dtype: IndexDtype = "bfloat16"

    def __post_init__(self) -> None:
        require_positive("index.rank", self.rank)
        require_choice("index.dtype", self.dtype, get_args(IndexDtype))


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
