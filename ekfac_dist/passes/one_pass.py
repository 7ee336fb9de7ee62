"""One pass over the data: each worker's batches through the model, then one reduction.

The covariance pass, the refit, query gradients and scans are all this pass, with another observer.

    each step     batch → forward and backward, shown to the observer → are its sums finite?
                  → progress → save the state, if it is time or SIGTERM has come
    at the end    parts of earlier starts are added → sums of all workers are added up

A step of a sharded model is a collective, and so is one whose rows travel. Then all workers do as
many steps; of a sharded model, those with fewer batches run a sequence that nobody observes. At the
end of each step they begin to tell each other what has happened in it, which they read at the end
of the next one, so that none waits for a slower one. If there is something to do, all do it then.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NoReturn, Protocol

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
        if error.status == Preempted.status and run.is_between_steps:
            run.watch.read_all()
            if run.watch.bad_step is None:
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
        is_between_steps: Whether the running sums hold all steps, and these whole.
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
        self.watch = FiniteWatch(context.world.device)
        self.loss = torch.full((), state.loss, dtype=torch.float64, device=context.world.device)
        self.num_labels = state.num_labels
        self.is_between_steps = True
        self._exchange: RowExchange | None = None
        if context.owners is not None and context.exchanges_rows:
            self._exchange = RowExchange(context, modules, observer, context.owners, state.batches)
        self._num_summed = 0  # steps that are in the running sums
        self._noticed: Callable[[], list[int]] | None = None  # in the last step, over all workers
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
                self._step(capture, batch)
                progress.update(batch.num_positions, len(indices))
                world.check_peers()
            for _ in range(self._num_idle):
                self._idle_step(capture)
                world.check_peers()
            if self._in_step:
                self._act_together()
            self._require_finite()

    def _step(self, capture: Capture, batch: Batch) -> None:
        """One forward and backward, after which the run may end, or save its state."""
        self.is_between_steps = False
        result = capture.run(batch, self._rule)
        self.loss += result.loss
        self.num_labels += result.num_labels
        if self._on_loss is not None:
            self._on_loss(batch, result.losses)
        self._end_step()

    def _idle_step(self, capture: Capture) -> None:
        """Takes part in a step of workers that have more batches; see `_step`."""
        self.is_between_steps = False
        if is_sharded(self._context.model):
            with capture.unseen() if self._exchange is None else self._exchange.idle():
                capture.run(self._context.shortest_batch(), self._rule)
        if self._exchange is None:
            self._agree()
        else:  # others' rows may come into its sums
            self._end_step()

    def _end_step(self) -> None:
        """Ends a step, whose last rows may be summed while the next one is computed."""
        after_sums = partial(self._after_sums, torch.isfinite(self.loss))
        if self._exchange is None:
            after_sums()
        else:
            self._exchange.end_step(after_sums)
        if self._in_step:
            self._agree()
            return
        if self.watch.bad_step is not None:
            self._require_finite()
        self._save(ends=preemption.requested(), is_due=self.state.is_due())

    def _after_sums(self, is_loss_finite: Tensor) -> None:
        """Counts a step, once all of its rows are in the running sums.

        Args:
            is_loss_finite: Whether the loss was finite after it, a boolean scalar.
        """
        if self._on_step is not None:
            self._on_step()
        self.watch.after(self._num_summed, is_loss_finite & torch.isfinite(self._observer.health()))
        self._num_summed += 1
        self.state.after_step()
        self.is_between_steps = self._exchange is None  # else the next one may have begun

    def _agree(self) -> None:
        """Learns what any worker has noticed in the step before, for which nobody has to wait."""
        earlier, self._noticed = self._noticed, None
        if self.state.is_always_due or (earlier is not None and any(earlier())):
            self._act_together()
            return
        is_bad = self.watch.bad_step is not None
        reasons = is_bad, preemption.requested(), self.state.is_due()
        self._noticed = self._world.begin_sum([int(reason) for reason in reasons])

    def _act_together(self) -> None:
        """Refuses sums that are not finite, and saves or ends, after the same step on all workers.

        Once one that shares out the sums has a reason to, all have.
        """
        earlier, self._noticed = self._noticed, None
        if earlier is not None:
            earlier()  # what it says is known anew below
        if self._exchange is not None:
            self._exchange.settle()
        self.is_between_steps = True
        self.watch.read_all()
        reports = self._world.gather(
            (self.watch.bad_step, preemption.requested(), self.state.is_due())
        )
        bad_steps, ends, are_due = zip(*reports, strict=True)
        bad_step = min((step for step in bad_steps if step is not None), default=None)
        if bad_step is not None:
            batches = self._world.gather(self.state.batches[bad_step : bad_step + 1])
            self._raise_non_finite([index for own in batches for batch in own for index in batch])
        self._save(ends=any(ends), is_due=any(are_due))
        self._world.wait_for_all()  # another may need longer to save its state

    def _save(self, *, ends: bool, is_due: bool) -> None:
        """Saves the running sums, if it is time."""
        if ends or is_due:
            self._require_finite()
            self.state.save(self.loss.item(), self.num_labels, ends=ends)

    def _require_finite(self) -> None:
        """Refuses this worker's sums if they are not finite."""
        self.watch.read_all()
        if self.watch.bad_step is not None:
            self._raise_non_finite(self.state.batches[self.watch.bad_step])

    def _raise_non_finite(self, indices: Sequence[int]) -> NoReturn:
        raise_non_finite(self._name, self._context, self._modules, indices, self._rule)

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
