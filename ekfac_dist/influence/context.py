"""What query and training gradients of one answer are computed with."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ekfac_dist.curvature.kronecker import damped
from ekfac_dist.factors.factors import Factors, ModuleFactors
from ekfac_dist.models.capture.labels import COVARIANCE_PASS, LabelRule
from ekfac_dist.models.capture.tasks import CAUSAL_LM, Task
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.runtime.processes import World

# Influence is of the labels that the data has, whichever the Fisher was fitted with.
DATA_LABELS = LabelRule("data", 0, COVARIANCE_PASS)
OVERFLOW_ADVICE = "Use model.dtype: float64"
# What is stored, in words, when SIGTERM ends a pass.
STORED = "blocks of queries that are finished are stored"


@dataclass(frozen=True)
class ScoringContext:
    """What query and training gradients have in common.

    Attributes:
        model: The prepared model, on the worker's device.
        factors: The factors.
        damping: λ of each module, absolute, by name.
        dtype: Precision of gradients and scores, float32 or float64.
        world: The workers.
        batch_tokens: Token budget of a batch.
        show_progress: Whether worker 0 shows progress.
        in_eigenbasis: Whether gradients are compared in the eigenbasis, into which training
            gradients then have to be rotated, instead of the parameters' own basis.
    """

    model: nn.Module
    factors: Factors
    damping: Mapping[str, float]
    dtype: torch.dtype
    world: World
    batch_tokens: int
    show_progress: bool
    in_eigenbasis: bool = False
    task: Task = CAUSAL_LM

    @property
    def modules(self) -> tuple[TrackedModule, ...]:
        """The tracked modules, in model order."""
        return tuple(self.factors.modules.values())

    @property
    def model_dtype(self) -> torch.dtype:
        """Of the model's own parameters."""
        return next(self.model.parameters()).dtype

    def zeros(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros where gradients are computed, in their dtype by default."""
        return torch.zeros(size, dtype=dtype or self.dtype, device=self.world.device)

    def damped(self, name: str, fitted: ModuleFactors) -> Tensor:
        """Λ + λ of a module [O, I]."""
        return damped(fitted.lambda_OI, self.damping[name])

    def at_device(self, name: str) -> ModuleFactors:
        """A module's factors where gradients are computed."""
        return self.factors.module(name).to(self.world.device, self.dtype)
