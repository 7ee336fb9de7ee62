"""NaN and infinity in a pass: noticed from the running sums, then traced to module and sequence."""

from collections import deque
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ekfac_dist.data.batches import CapturedPositions
from ekfac_dist.errors import NonFiniteError
from ekfac_dist.models.capture.labels import LabelRule
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.passes.context import PassContext


class FiniteWatch:
    """Remembers, of each step, whether the running sums were finite after it.

    On a GPU the flag is copied to the host while the next step is computed, and read then, so that
    the host never waits for the GPU to become idle.

    Args:
        device: Where the running sums are.

    Attributes:
        bad_step: The first step after which they were not finite, as far as flags are read; None if
            there is none.
    """

    def __init__(self, device: torch.device) -> None:
        self.bad_step: int | None = None
        self._device, self._on_gpu = device, device.type == "cuda"
        self._flags: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def after(self, step: int, is_finite: Tensor) -> None:
        """Takes the flag of a step.

        Args:
            step: Its number.
            is_finite: A boolean scalar, on the device.
        """
        event = None
        if self._on_gpu:
            is_finite = is_finite.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
        self._flags.append((step, is_finite, event))
        self._read(1 if self._on_gpu else 0)

    def read_all(self) -> None:
        """Reads every flag."""
        self._read(0)

    def _read(self, num_unread: int) -> None:
        while len(self._flags) > num_unread:
            step, is_finite, event = self._flags.popleft()
            if event is not None:
                event.synchronize()
            if self.bad_step is None and not is_finite.item():
                self.bad_step = step


class _FirstNonFinite:
    """An observer that remembers the first input, and the first gradient, that is not finite.

    The first input in model order: checkpointed layers show theirs from the last to the first.

    Args:
        modules: The tracked modules, in model order.
    """

    def __init__(self, modules: Sequence[TrackedModule]) -> None:
        self._order = {module.name: number for number, module in enumerate(modules)}
        self._first_input: TrackedModule | None = None
        self.gradient: str | None = None

    @property
    def input(self) -> str | None:
        """What to call the first input that is not finite; None: all are."""
        first = self._first_input
        return None if first is None else f"the input of module {first.name}"

    def on_input(
        self, module: TrackedModule, acts_Mi: Tensor, positions: CapturedPositions
    ) -> None:
        order, first = self._order, self._first_input
        is_earlier = first is None or order[module.name] < order[first.name]
        if is_earlier and not torch.isfinite(acts_Mi).all():
            self._first_input = module

    def on_gradient(
        self, module: TrackedModule, grads_MO: Tensor, positions: CapturedPositions
    ) -> None:
        if self.gradient is None and not torch.isfinite(grads_MO).all():
            self.gradient = f"the output-gradient of module {module.name}"


def raise_non_finite(
    pass_name: str,
    context: PassContext,
    modules: Sequence[TrackedModule],
    batch: Sequence[int],
    rule: LabelRule,
) -> NoReturn:
    """Runs a batch again, one sequence at a time, to name where NaN or infinity first appears.

    Args:
        pass_name: What the pass is called.
        context: Model, data and workers.
        modules: The tracked modules of the pass.
        batch: Indices of the batch's sequences.
        rule: Where the pass's labels come from.

    Raises:
        NonFiniteError: Always; it names module and sequence, or says that the sum overflowed.
    """
    advice = (
        "Check the model's weights, or use a wider dtype; data.max_tokens and the text of that "
        "sequence may matter too."
    )
    for index in batch:
        single = context.batch([index])
        first = _FirstNonFinite(modules)
        with context.capture(modules, first, context.dtype) as capture:
            loss = capture.run(single, rule).loss
        logits = None if torch.isfinite(loss) else "the logits"
        where = first.input or logits or first.gradient  # in the order in which they are computed
        if where is not None:
            raise NonFiniteError(
                f"NaN or infinity in {where}, in the {pass_name} pass, at "
                f"{context.called(single.indices[0])}. {advice}"
            )
    rows = [int(context.sequences.indices[index]) for index in batch]
    raise NonFiniteError(
        f"NaN or infinity in a running sum of the {pass_name} pass, in the step of sequences "
        f"{rows[0]} to {rows[-1]} ({len(rows)} of them), though each alone is finite: the "
        f"sum overflowed. {context.wider}. {advice}"
    )
