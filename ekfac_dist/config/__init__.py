"""The configuration of a run: plain dataclasses that check themselves.

Every field has one meaning, one default, and one help text, its docstring here. A value that cannot
be meant raises `ConfigError`; types are checked by the command line's parser.
"""

from ekfac_dist.config.checks import (
    require_checkpointing,
    require_given,
    require_pass_settings,
    require_positive,
)
from ekfac_dist.config.estimate import (
    Checkpointing,
    DataConfig,
    EstimateConfig,
    FactorsConfig,
    Labels,
    ModelConfig,
)
from ekfac_dist.config.evaluate import (
    EvaluateConfig,
    LdsConfig,
    RemovalConfig,
    TailPatchConfig,
    TrainingConfig,
)
from ekfac_dist.config.fields import dotted, field_types
from ekfac_dist.config.index import IndexConfig, Kept, KeptConfig
from ekfac_dist.config.plan import PlanConfig
from ekfac_dist.config.query import (
    DEFAULT_TOP_K,
    DampingConfig,
    Normalize,
    PerToken,
    QueryConfig,
    QueryDataConfig,
    QueryModelConfig,
    ScoresConfig,
    Tokens,
    require_refinable,
    require_rescorable,
    with_rescoring,
)
from ekfac_dist.config.refine import RefineConfig, RefineMethod
from ekfac_dist.config.serve import ServeConfig

__all__ = [
    "DEFAULT_TOP_K",
    "Checkpointing",
    "DampingConfig",
    "DataConfig",
    "EstimateConfig",
    "EvaluateConfig",
    "FactorsConfig",
    "IndexConfig",
    "Kept",
    "KeptConfig",
    "Labels",
    "LdsConfig",
    "ModelConfig",
    "Normalize",
    "PerToken",
    "PlanConfig",
    "QueryConfig",
    "QueryDataConfig",
    "QueryModelConfig",
    "RefineConfig",
    "RefineMethod",
    "RemovalConfig",
    "ScoresConfig",
    "ServeConfig",
    "TailPatchConfig",
    "Tokens",
    "TrainingConfig",
    "dotted",
    "field_types",
    "require_checkpointing",
    "require_given",
    "require_pass_settings",
    "require_positive",
    "require_refinable",
    "require_rescorable",
    "with_rescoring",
]
