"""Whether a model's layers compute the same when they are computed again in the backward.

Not decided by the model's name: a batch is run with and without checkpointing, and whatever an
observer sees is compared. Layers that change their state in a forward, or write into their inputs,
are found so.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ekfac_dist.data.batches import Batch, CapturedPositions
from ekfac_dist.errors import ModelError, first_line
from ekfac_dist.models.capture.checkpointing import ADVICE, LayerCheckpointing
from ekfac_dist.models.capture.chunked_head_checks import ROUNDING
from ekfac_dist.models.capture.hooks import Capture
from ekfac_dist.models.capture.labels import LabelRule
from ekfac_dist.models.capture.tasks import Task
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.models.sharding import class_of, forget_forward, layers, reshard

_RULE = LabelRule("data", 0, 0)
_QUANTISED = ROUNDING[torch.bfloat16]


def why_not_repeated(
    model: nn.Module, modules: Sequence[TrackedModule], batch: Batch, task: Task
) -> str | None:
    """Why a model's layers cannot be computed again in the backward: a sentence; None if they can.

    Args:
        model: A prepared model.
        modules: The tracked modules.
        batch: Sequences to try it with, few and short, on the model's device.
        task: What the model is asked, and what its loss is.

    Returns:
        None if every input and output-gradient is the same with and without checkpointing, up to
        rounding.

    Raises:
        ModelError: If the model cannot be captured without checkpointing either.
    """
    if not layers(model):
        return f"{class_of(model).__name__} has no layers (an nn.ModuleList of them). {ADVICE}"
    expected = _Kept()
    with Capture(model, modules, expected, None, task) as capture:
        capture.run(batch, _RULE)
    compared = _Compared(expected, _rounding(model))
    checkpointing = LayerCheckpointing(model, modules)
    try:
        with Capture(model, modules, compared, None, task, None, checkpointing) as capture:
            capture.run(batch, _RULE)
    except torch.OutOfMemoryError:
        raise  # a pass would run out of memory, too
    except ModelError as error:
        compared.fault = str(error)
    except Exception as error:  # a model that fails so is not run so
        compared.fault = (
            f"{class_of(model).__name__} fails when its layers are computed again in the backward "
            f"({first_line(error)}). {ADVICE}"
        )
    else:
        return compared.fault or compared.missing
    forget_forward(model)
    reshard(model)
    return compared.fault


def _rounding(model: nn.Module) -> float:
    """Relative change that rounding explains."""
    return ROUNDING.get(next(model.parameters()).dtype, _QUANTISED)


class _Kept:
    """An observer that keeps what it sees, in the host's memory."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], Tensor] = {}

    def on_input(
        self, module: TrackedModule, acts_Mi: Tensor, positions: CapturedPositions
    ) -> None:
        self.rows["input", module.input] = acts_Mi.to("cpu", copy=True)

    def on_gradient(
        self, module: TrackedModule, grads_MO: Tensor, positions: CapturedPositions
    ) -> None:
        self.rows["output-gradient", module.name] = grads_MO.to("cpu", copy=True)


class _Compared:
    """An observer that compares what it sees with what another has kept.

    Args:
        expected: The other.
        rounding: Relative change that rounding explains.

    Attributes:
        fault: A sentence about the first difference; None if there is none.
    """

    def __init__(self, expected: _Kept, rounding: float) -> None:
        self._expected, self._rounding = expected.rows, rounding
        self._seen: set[tuple[str, str]] = set()
        self.fault: str | None = None

    @property
    def missing(self) -> str | None:
        """A sentence about what only one of the two runs has shown; None if there is nothing."""
        if self._expected.keys() == self._seen:
            return None
        side, name = min(self._expected.keys() ^ self._seen)
        return f"The {side} of {name} is seen either with checkpointing or without it. {ADVICE}"

    def on_input(
        self, module: TrackedModule, acts_Mi: Tensor, positions: CapturedPositions
    ) -> None:
        self._compare("input", module.input, module, acts_Mi)

    def on_gradient(
        self, module: TrackedModule, grads_MO: Tensor, positions: CapturedPositions
    ) -> None:
        self._compare("output-gradient", module.name, module, grads_MO)

    def _compare(self, side: str, key: str, module: TrackedModule, rows: Tensor) -> None:
        self._seen.add((side, key))
        expected = self._expected.get((side, key))
        if expected is None or self.fault is not None:
            return
        difference = float("inf")
        if rows.shape == expected.shape:
            rows, expected = rows.cpu().double(), expected.double()
            # NaN where a row is: a pass will report where that comes from.
            difference = ((rows - expected).norm() / expected.norm().clamp_min(1e-300)).item()
        if difference > self._rounding:
            self.fault = (
                f"The {side} of module {module.name} changes when its layer is computed again in "
                f"the backward (relative difference {difference:.2g}): the layer remembers "
                f"something of what it has computed. {ADVICE}"
            )
