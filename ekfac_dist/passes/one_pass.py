"""One pass over the data: each worker's batches through the model, then one reduction.

The covariance pass, the refit, query gradients and scans are all this pass, with another observer.

    each step     batch → forward and backward, shown to the observer → are its sums finite?
                  → progress → save the state, if it is time or SIGTERM has come
    at the end    parts of earlier starts are added → sums of all workers are added up

A step of a sharded model is a collective. Then all workers do as many steps, those with fewer
batches running a sequence that nobody observes, and agree at the end of each step on what
happened in it.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ekfac_dist.data.batches import Batch
from ekfac_dist.errors import NonFiniteError, Preempted, UserError
from ekfac_dist.models.capture.hooks import Capture
from ekfac_dist.models.capture.labels import LabelRule
from ekfac_dist.models.capture.observers import Observer
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.models.sharding import is_sharded
from ekfac_dist.passes.context import PassContext
from ekfac_dist.passes.exchange import RowExchange
from ekfac_dist.passes.finite import FiniteWatch, raise_non_finite
from ekfac_dist.passes.state import PassState
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.progress import Progress


@dataclass(frozen=True)
class PassResult:
    """Time, loss and labels of one pass, over all workers.

    Attributes:
        seconds: From this worker's start to the end of the reduction.
        loss: Mean −log p(label) over all labels, in nats.
        num_labels: Number of labels.
    """

    seconds: float
    loss: float
    num_labels: int


class SummingObserver(Observer, Protocol):
    """An observer with running sums, which are reduced over the workers at the end of a pass."""

    def health(self) -> Tensor:
        """A scalar that is finite exactly as long as every running sum is."""

    def reduce(self, world: World) -> None:
        """Replaces the running sums by those over all workers."""


def run_pass(
    name: str,
    context: PassContext,
    modules: Sequence[TrackedModule],
    observer: SummingObserver,
    rule: LabelRule,
    on_loss: Callable[[Batch, Tensor], None] | None = None,
    *,
    on_step: Callable[[], None] | None = None,
    converted: bool = True,
    state: PassState | None = None,
) -> PassResult:
    """Runs this worker's batches through the model and reduces the observer's running sums.

    Args:
        name: What the pass is called in progress and errors.
        context: Model, data and workers.
        modules: The tracked modules of this pass.
        observer: What is done with inputs and output-gradients.
        rule: Where labels come from.
        on_loss: Called after each batch with −log p of each of its sequences [B], float64.
        on_step: Called after each step, once the observer has been shown all that belongs to it:
            what this worker captured; where rows travel, what all workers of its copy did, also in
            steps that this worker has no batch for.
        converted: Whether the observer is given float32 or float64, as its sums are; else the
            model's own dtype.
        state: Which batches are left, and how running sums are saved; None: all, and not at all.

    Raises:
        NonFiniteError: If NaN or infinity appears; it names module and sequence where it can.
        PeerError: If another worker failed.
        Preempted: If SIGTERM has come; the state is saved.
        OutputError: If the state cannot be saved.
    """
    start = time.perf_counter()
    state = state or PassState(context.own_batches)
    run = _Run(name, context, modules, observer, rule, on_loss, on_step, state)
    try:
        run.all_steps(context.dtype if converted else None)
    except UserError as error:
        # This worker or another was asked to end: what this one has summed is not lost.
        is_asked = error.status == Preempted.status and run.is_between_steps
        if is_asked and run.watch.last() is None:
            run.state.leave(run.loss.item(), run.num_labels)
        raise
    loss, num_labels = run.reduced()
    return PassResult(time.perf_counter() - start, loss / num_labels, int(num_labels))


class _Run:
    """One worker's part of a pass; arguments as of `run_pass`.

    Attributes:
        state: Which batches are left, and how running sums are saved.
        watch: Whether the running sums are finite.
        loss: Σ −log p(label) so far, a float64 scalar on the worker's device.
        num_labels: Labels so far.
        is_between_steps: Whether the running sums hold whole steps.
    """

    def __init__(
        self,
        name: str,
        context: PassContext,
        modules: Sequence[TrackedModule],
        observer: SummingObserver,
        rule: LabelRule,
        on_loss: Callable[[Batch, Tensor], None] | None,
        on_step: Callable[[], None] | None,
        state: PassState,
    ) -> None:
        self._name, self._context, self._modules = name, context, modules
        self._observer, self._rule = observer, rule
        self._on_loss, self._on_step = on_loss, on_step
        self._world, self._in_step = context.world, context.runs_in_step
        self.state = state
        self.watch = FiniteWatch(context.world.device, may_lag=not self._in_step)
        self.loss = torch.full((), state.loss, dtype=torch.float64, device=context.world.device)
        self.num_labels = state.num_labels
        self.is_between_steps = True
        self._exchange: RowExchange | None = None
        if context.owners is not None and context.exchanges_rows:
            self._exchange = RowExchange(context, modules, observer, context.owners, state.batches)
        self._num_idle = 0  # steps that only other workers have batches for
        if self._in_step:
            num_steps = self._world.gather(len(state.batches))
            self._num_idle = max(num_steps) - num_steps[self._world.rank]

    def all_steps(self, dtype: torch.dtype | None) -> None:
        """Runs every batch that is left; as many steps as other workers, if steps are collectives.

        Args:
            dtype: What the observer is given; None: the model's own.
        """
        context, world = self._context, self._world
        progress = self._progress()
        together = (NonFiniteError, Preempted) if self._in_step else None
        observer: Observer = self._observer
        if self._exchange is not None:  # rows travel in the model's dtype
            self._exchange.dtype, dtype, observer = dtype, None, self._exchange
        with (
            # A step may take longer than a worker waits for others; when it ends, all agree to end.
            world.leaving_together() if self._in_step else nullcontext(),
            world.agree(together=together),
            context.capture(self._modules, observer, dtype, world.device) as capture,
            progress,
        ):
            for indices, batch in context.prefetched(self.state.batches):
                ends, is_due = self._step(capture, indices, batch)
                progress.update(batch.num_positions, len(indices))
                self._after_step(ends=ends, is_due=is_due)
                world.check_peers()
            self._require_finite(self.watch.last())
            for _ in range(self._num_idle):
                ends, is_due = self._idle_step(capture)
                if self._exchange is not None:  # others' rows may be in its sums
                    self._after_step(ends=ends, is_due=is_due)
                elif ends:
                    self.state.save(self.loss.item(), self.num_labels, ends=True)

    def _step(self, capture: Capture, indices: Sequence[int], batch: Batch) -> tuple[bool, bool]:
        """One forward and backward; whether the run is to end, or to save its state, after it."""
        if self._in_step:
            self._world.wait_for_all()  # another may be saving its state
        self.is_between_steps = False
        result = capture.run(batch, self._rule)
        if self._exchange is not None:
            self._exchange.end_step()
        self.loss += result.loss
        self.num_labels += result.num_labels
        if self._on_loss is not None:
            self._on_loss(batch, result.losses)
        if self._on_step is not None:
            self._on_step()
        is_finite = torch.isfinite(self._observer.health() + self.loss)
        return self._agreed(self.watch.after(indices, is_finite), indices)

    def _idle_step(self, capture: Capture) -> tuple[bool, bool]:
        """Takes part in a step of workers that have more batches; see `_step`."""
        self._world.wait_for_all()
        self.is_between_steps = False
        if is_sharded(self._context.model):
            with capture.unseen() if self._exchange is None else self._exchange.idle():
                capture.run(self._context.shortest_batch(), self._rule)
        is_finite = torch.isfinite(self.loss)
        if self._exchange is not None:
            self._exchange.end_step()
            if self._on_step is not None:
                self._on_step()
            is_finite = torch.isfinite(self._observer.health() + self.loss)
        return self._agreed(self.watch.after([], is_finite), [])

    def _after_step(self, *, ends: bool, is_due: bool) -> None:
        """Counts a step, and saves the running sums if it is time."""
        self.state.after_step()
        self.is_between_steps = True
        if ends or is_due:
            self._require_finite(self.watch.last())
            self.state.save(self.loss.item(), self.num_labels, ends=ends)

    def _agreed(self, bad_batch: Sequence[int] | None, batch: Sequence[int]) -> tuple[bool, bool]:
        """Refuses sums that are not finite; of any worker, if in step.

        Args:
            bad_batch: This worker's batch after which its sums were not finite; None: none was.
            batch: This worker's batch of the step.

        Returns:
            Whether the run is to end after this step, and whether its state is to be saved.
        """
        ends, is_due = preemption.requested(), self.state.is_due()
        if self._in_step:
            reports = self._world.gather((bad_batch, batch, ends, is_due))
            bad_batch = next((bad for bad, *_ in reports if bad is not None), None)
            ends = any(ends for _, _, ends, _ in reports)
            if self._exchange is not None:
                is_due = any(is_due for *_, is_due in reports)
                if bad_batch is not None:
                    bad_batch = [index for _, every, *_ in reports for index in every]
        self._require_finite(bad_batch)
        return ends, is_due

    def _require_finite(self, bad_batch: Sequence[int] | None) -> None:
        if bad_batch is not None:
            raise_non_finite(self._name, self._context, self._modules, bad_batch, self._rule)

    def _progress(self) -> Progress:
        sequences, batches = self._context.sequences, self.state.batches
        return Progress(
            self._name,
            total=sum(int(sequences.num_positions[indices].sum()) for indices in batches),
            unit="tokens",
            num_sequences=sum(map(len, batches)),
            whole=(int(sequences.num_positions.sum()), len(sequences)),
            enabled=self._context.show_progress and self._world.is_main,
        )

    def reduced(self) -> tuple[float, float]:
        """Reduces the running sums over all workers; total loss, in nats, and number of labels."""
        with self._world.agree():
            earlier_loss, earlier_labels = self.state.complete()
        loss, num_labels = self.loss + earlier_loss, self.num_labels + earlier_labels
        self._observer.reduce(self._context.summed_over)
        totals = torch.stack([loss, loss.new_tensor(num_labels)])
        self._world.all_reduce_([totals])
        total_loss, total_labels = totals.tolist()
        return total_loss, total_labels
