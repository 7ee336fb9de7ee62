"""EK-FAC curvature factors of language models' MLP blocks, fitted on many workers.

The Python API: `estimate_factors` fits, `load_factors` opens what was fitted, `influence_scores`
answers queries with it; a `Task` says what the model is asked. They are imported when they are
first used, so that the command line answers at once.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ekfac_dist.factors.factors import Factors
    from ekfac_dist.factors.opening import load_factors
    from ekfac_dist.fit.estimate import estimate_factors
    from ekfac_dist.influence.for_python import influence_scores
    from ekfac_dist.influence.scores import InfluenceScores
    from ekfac_dist.models.capture.labels import Draws
    from ekfac_dist.models.capture.tasks import (
        CausalLM,
        LossTask,
        MaskedLM,
        Seq2SeqLM,
        SequenceClassification,
        Task,
    )

__all__ = [
    "CausalLM",
    "Draws",
    "Factors",
    "InfluenceScores",
    "LossTask",
    "MaskedLM",
    "Seq2SeqLM",
    "SequenceClassification",
    "Task",
    "estimate_factors",
    "influence_scores",
    "load_factors",
]
__version__ = "0.1.0"

_HOMES = {
    "Factors": "ekfac_dist.factors.factors",
    "load_factors": "ekfac_dist.factors.opening",
    "estimate_factors": "ekfac_dist.fit.estimate",
    "InfluenceScores": "ekfac_dist.influence.scores",
    "influence_scores": "ekfac_dist.influence.for_python",
    "Draws": "ekfac_dist.models.capture.labels",
    **dict.fromkeys(
        ("CausalLM", "LossTask", "MaskedLM", "Seq2SeqLM", "SequenceClassification", "Task"),
        "ekfac_dist.models.capture.tasks",
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
