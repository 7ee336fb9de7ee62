"""The scoring context: all that both query gradients and training gradients are computed with."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ekfac_dist.config import RefineConfig
from ekfac_dist.curvature.kronecker import damped
from ekfac_dist.data.batch_plan import worker_batches
from ekfac_dist.data.examples import Examples
from ekfac_dist.factors.factors import Factors
from ekfac_dist.influence.device_factors import DeviceFactors
from ekfac_dist.models.capture.labels import COVARIANCE_PASS, LabelRule
from ekfac_dist.models.capture.tasks import CAUSAL_LM, Task
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.passes.context import PassContext
from ekfac_dist.passes.owners import Owners
from ekfac_dist.passes.row_order import RowOrder
from ekfac_dist.runtime.processes import World

# Gradients are of the data's own labels, also where the Fisher was fitted with sampled labels.
DATA_LABELS = LabelRule("data", 0, COVARIANCE_PASS)
OVERFLOW_ADVICE = "Use model.dtype: float64"
# Said by the error with which SIGTERM ends a pass.
STORED = "blocks of queries that are finished are stored"


@dataclass(frozen=True)
class ScoringContext:
    """Model, factors, damping and workers of one set of scores.

    Attributes:
        model: The prepared model, on the worker's device.
        factors: The factors.
        damping: Absolute λ of each module, by name.
        dtype: Precision of gradients and scores, float32 or float64.
        world: The workers.
        batch_tokens: Token budget of a batch, padding included.
        show_progress: Whether worker 0 shows progress.
        in_eigenbasis: Whether query and training gradients are multiplied in the eigenbasis, where
            norms are cheap but training gradients have to be rotated; else in the parameters' own
            basis.
        task: The task whose loss gradients are of.
        owners: Who holds which modules' factors and query gradients; None: every worker all.
        checkpoints: Whether layers keep their inputs alone, and are computed again in the backward.
        row_order: In which order a step shows the rows of modules; needed where they travel.
        on_device: The factors on the worker's device; needed by passes.
        refine: How query gradients are refined.
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
    owners: Owners | None = None
    checkpoints: bool = False
    row_order: RowOrder | None = None
    on_device: DeviceFactors | None = None
    refine: RefineConfig = field(default_factory=RefineConfig)

    @property
    def modules(self) -> tuple[TrackedModule, ...]:
        """The tracked modules, in model order."""
        return tuple(self.factors.modules.values())

    @property
    def own_modules(self) -> tuple[TrackedModule, ...]:
        """Those whose factors and query gradients this worker holds, in model order."""
        owners = self.owners
        return tuple(m for m in self.modules if owners is None or owners.owns(m))

    @property
    def shard(self) -> int:
        """Number of workers that share one copy of the factors and query gradients."""
        return 1 if self.owners is None else self.owners.shard

    @property
    def copy_ranks(self) -> range:
        """Ranks of the workers that share this worker's copy."""
        first = self.world.rank // self.shard * self.shard
        return range(first, first + self.shard)

    @property
    def model_dtype(self) -> torch.dtype:
        """Dtype of the model's parameters."""
        return next(self.model.parameters()).dtype

    def over(self, sequences: Examples) -> PassContext:
        """What a pass over some scored sequences, shared out over the workers, computes with."""
        world = self.world
        own_batches = worker_batches(
            sequences.num_positions,
            self.batch_tokens,
            world.size,
            world.rank,
            sequences.equal_above,
        )
        return PassContext(
            self.model,
            sequences,
            own_batches,
            world,
            self.dtype,
            self.show_progress,
            wider=OVERFLOW_ADVICE,
            task=self.task,
            owners=self.owners,
            checkpoints=self.checkpoints,
            row_order=self.row_order,
        )

    def zeros(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of zeros on the worker's device; of the gradients' dtype by default."""
        return torch.zeros(size, dtype=dtype or self.dtype, device=self.world.device)

    @property
    def fitted(self) -> DeviceFactors:
        """The factors on the worker's device, in the gradients' dtype."""
        assert self.on_device is not None, "a pass needs the factors on its device"
        return self.on_device

    @property
    def converts_rows(self) -> bool:
        """Whether a pass shows training rows in the gradients' dtype; else in the model's own."""
        return not (self.in_eigenbasis and self.fitted.splits)

    def damped(self, module: TrackedModule) -> Tensor:
        """Λ + λ of a module [O, I]."""
        return damped(self.fitted.lambda_of(module), self.damping[module.name])
