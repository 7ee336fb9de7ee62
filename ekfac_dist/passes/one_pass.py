"""One pass over this worker's batches: what the covariance and the refit pass have in common."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ekfac_dist.data.batches import Batch, CapturedPositions
from ekfac_dist.data.examples import Examples
from ekfac_dist.errors import NonFiniteError, Preempted, UserError
from ekfac_dist.models.capture.hooks import Capture, NullObserver, Observer
from ekfac_dist.models.capture.labels import LabelRule
from ekfac_dist.models.capture.saved_tensors import StepMemory, noting_saved_tensors
from ekfac_dist.models.capture.tasks import CAUSAL_LM, Task
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.models.sharding import agreeing, is_sharded
from ekfac_dist.passes.state import PassState
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.prefetch import prefetch
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.progress import Progress


@dataclass(frozen=True)
class PassContext:
    """What every pass of a run computes with.

    Attributes:
        model: The prepared model, on the worker's device.
        sequences: All sequences of the run.
        own_batches: This worker's batches, as numbers of sequences.
        world: The workers.
        dtype: Precision of the running sums.
        show_progress: Whether worker 0 shows progress.
        called: What errors call a sequence; {} stands for its row in the source.
        wider: What an error advises against a sum that overflows.
        task: What is asked of the model.
    """

    model: nn.Module
    sequences: Examples
    own_batches: Sequence[Sequence[int]]
    world: World
    dtype: torch.dtype
    show_progress: bool
    called: str = "sequence {} of the data"
    wider: str = "Use factors.accumulate: float64"
    task: Task = CAUSAL_LM

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Some sequences as a batch on the worker's device."""
        return self.sequences.batch(numbers).to(self.world.device)

    @property
    def shortest(self) -> list[int]:
        """The shortest sequence, as a batch of its own."""
        return [int(self.sequences.num_positions.argmin())]

    def batches(self, shard: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], Batch]]:
        """Batches with their sequences' numbers, made ahead of the device's work.

        They are sent to the device from here, on the stream that the model computes on.
        """
        made = prefetch(self.sequences.batch, shard)
        for numbers, batch in zip(shard, made, strict=True):
            yield numbers, batch.to(self.world.device)


@dataclass(frozen=True)
class PassResult:
    """What one pass took, over all workers.

    Attributes:
        seconds: From this worker's start to the end of the reduction.
        loss: Mean −log p(label) over all labels, in nats.
        num_labels: How many labels there were.
    """

    seconds: float
    loss: float
    num_labels: int


def measured_step(work: PassContext, modules: Sequence[TrackedModule]) -> StepMemory:
    """What this worker's largest batch holds, by running it once; nothing where it has none.

    A collective if the model is sharded.

    Args:
        work: Model, data and workers.
        modules: All tracked modules.
    """
    if not work.own_batches and not is_sharded(work.model):
        return StepMemory.nothing()
    lengths = work.sequences.num_positions
    largest = max(work.own_batches, key=lambda n: lengths[n].sum()) if work.own_batches else [0]
    batch = work.batch(largest)
    rule = LabelRule("data", 0, 0)
    with (
        noting_saved_tensors(work.model) as kept,
        Capture(work.model, modules, NullObserver(), None, work.task) as capture,
    ):
        gradient = capture.run(batch, rule).gradient
    return StepMemory(kept.num_bytes, gradient.nbytes, gradient.dtype.itemsize)


class SummingObserver(Observer, Protocol):
    """An observer whose running sums tell whether all that went in was finite."""

    def health(self) -> Tensor:
        """A scalar that is finite exactly as long as every running sum is."""

    def reduce(self, world: World) -> None:
        """Adds up the running sums of all workers."""


def run_pass(
    name: str,
    work: PassContext,
    modules: Sequence[TrackedModule],
    observer: SummingObserver,
    rule: LabelRule,
    on_loss: Callable[[Batch, Tensor], None] | None = None,
    *,
    converted: bool = True,
    state: PassState | None = None,
) -> PassResult:
    """Runs this worker's batches through the model and reduces what the observer summed.

    Args:
        name: What the pass is called in progress and errors.
        work: Model, data and workers.
        modules: The tracked modules of this pass.
        observer: What is done with inputs and gradients.
        rule: Where labels come from.
        on_loss: Called after each batch with −log p of each of its sequences [B], float64.
        converted: Whether the observer's rows are converted to the sums' dtype, or as the model
            has them.
        state: What is left of the pass, and how it is saved; None: all of it, and not at all.

    Raises:
        NonFiniteError: NaN or infinity was met; the module and sequence are named where known.
        PeerError: Another worker failed.
        Preempted: SIGTERM has come, and the state is saved.
        OutputError: It cannot be saved.
    """
    world, dtype = work.world, work.dtype if converted else None
    state = state or PassState(work.own_batches)
    own_tokens = sum(int(work.sequences.num_positions[numbers].sum()) for numbers in state.batches)
    all_tokens = int(work.sequences.num_positions.sum())
    start = time.perf_counter()
    loss = torch.full((), state.loss, dtype=torch.float64, device=world.device)
    num_labels = state.num_labels
    progress = Progress(
        name,
        total=own_tokens,
        unit="tokens",
        num_sequences=sum(map(len, state.batches)),
        whole=(all_tokens, len(work.sequences)),
        enabled=work.show_progress and world.is_main,
    )
    # Steps of a sharded model are collectives: all have as many, and learn of what comes of them.
    in_step = is_sharded(work.model)
    idle = max(steps := world.gather(len(state.batches))) - steps[world.rank] if in_step else 0
    watch = _Watch(world.device, late=not in_step)

    def require_finite(spoilt: Sequence[int] | None) -> None:
        if spoilt is not None:
            _raise_non_finite(name, work, modules, spoilt, rule)

    try:
        with (
            agreeing(world, work.model, NonFiniteError, Preempted),
            Capture(work.model, modules, observer, dtype, work.task, world.device) as capture,
            progress,
        ):
            for numbers, batch in work.batches(state.batches):
                if in_step:
                    world.wait_for_all()  # another may be saving its state
                result = capture.run(batch, rule)
                loss += result.loss
                num_labels += result.num_labels
                if on_loss is not None:
                    on_loss(batch, result.losses)
                spoilt = watch.after(numbers, torch.isfinite(observer.health() + loss))
                ends = preemption.requested()
                if in_step:
                    spoilt, ends = _told_by_all(world, spoilt, ends)
                require_finite(spoilt)
                progress.update(batch.num_positions, len(numbers))
                state.after_step()
                if ends or state.is_due():
                    require_finite(watch.last())
                    state.save(loss.item(), num_labels, ends=ends)
                world.check_peers()
            require_finite(watch.last())
            for _ in range(idle):
                world.wait_for_all()
                with capture.unseen():
                    capture.run(work.batch(work.shortest), rule)
                spoilt, ends = _told_by_all(world, None, preemption.requested())
                require_finite(spoilt)
                if ends:
                    state.save(loss.item(), num_labels, ends=True)
    except UserError as error:
        # Another worker, or this one, was asked to end: what this one has done is not lost.
        if error.status == Preempted.status and watch.last() is None:
            state.leave(loss.item(), num_labels)
        raise
    with world.agree():
        kept_loss, kept_labels = state.complete()
    loss, num_labels = loss + kept_loss, num_labels + kept_labels
    observer.reduce(world)
    totals = torch.stack([loss, loss.new_tensor(num_labels)])
    world.all_reduce_([totals])
    all_loss, all_labels = totals.tolist()
    return PassResult(time.perf_counter() - start, all_loss / all_labels, int(all_labels))


def _told_by_all(
    world: World, spoilt: Sequence[int] | None, ends: bool
) -> tuple[Sequence[int] | None, bool]:
    """At the end of a step of all workers: the first bad batch of any, and whether one is to end.

    Args:
        world: The workers.
        spoilt: The batch that spoilt this worker's sums, if one did.
        ends: Whether this worker is to end.
    """
    told = world.gather((spoilt, ends))
    first = next((numbers for numbers, _ in told if numbers is not None), None)
    return first, any(ends for _, ends in told)


class _Watch:
    """Whether the sums were finite after each batch, on a GPU asked for without waiting for it.

    The answer to one batch is read when the next has been sent, so the GPU always has work.

    Args:
        device: Where the sums are.
        late: Whether it may come so late; else it is waited for.
    """

    def __init__(self, device: torch.device, *, late: bool) -> None:
        self._device, self._on_gpu, self._late = device, device.type == "cuda", late
        self._asked: deque[tuple[Sequence[int], Tensor, torch.cuda.Event | None]] = deque()

    def after(self, numbers: Sequence[int], finite: Tensor) -> Sequence[int] | None:
        """Asks of a batch; gives the first batch that was found to have spoilt the sums."""
        event = None
        if self._on_gpu:
            finite = finite.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
        self._asked.append((numbers, finite, event))
        return self._read(leave=1 if self._on_gpu and self._late else 0)

    def last(self) -> Sequence[int] | None:
        """The same of what is still to be read, at the end."""
        return self._read(leave=0)

    def _read(self, leave: int) -> Sequence[int] | None:
        while len(self._asked) > leave:
            numbers, finite, event = self._asked.popleft()
            if event is not None:
                event.synchronize()
            if not finite.item():
                return numbers
        return None


class _FirstNonFinite:
    """Remembers the first input, and the first output-gradient, that is not finite."""

    def __init__(self) -> None:
        self.input: str | None = None
        self.gradient: str | None = None

    def on_input(self, module: TrackedModule, rows_Mi: Tensor, batch: CapturedPositions) -> None:
        if self.input is None and not torch.isfinite(rows_Mi).all():
            self.input = f"the input of module {module.name}"

    def on_gradient(self, module: TrackedModule, rows_MO: Tensor, batch: CapturedPositions) -> None:
        if self.gradient is None and not torch.isfinite(rows_MO).all():
            self.gradient = f"the output-gradient of module {module.name}"


def _raise_non_finite(
    name: str,
    work: PassContext,
    modules: Sequence[TrackedModule],
    numbers: Sequence[int],
    rule: LabelRule,
) -> None:
    """Runs a batch again, one sequence at a time, to name where NaN or infinity first appears."""
    advice = (
        "Check the model's weights, or use a wider dtype; data.max_tokens and the text of that "
        "sequence may matter too."
    )
    for number in numbers:
        batch = work.batch([number])
        first = _FirstNonFinite()
        with Capture(work.model, modules, first, work.dtype, work.task) as capture:
            loss = capture.run(batch, rule).loss
        logits = None if torch.isfinite(loss) else "the logits"
        where = first.input or logits or first.gradient  # as they come about
        if where is not None:
            raise NonFiniteError(
                f"NaN or infinity in {where}, in the {name} pass, at "
                f"{work.called.format(batch.indices[0])}. {advice}"
            )
    indices = [int(work.sequences.indices[number]) for number in numbers]
    raise NonFiniteError(
        f"NaN or infinity in a running sum of the {name} pass, in the step of sequences "
        f"{indices[0]} to {indices[-1]} ({len(indices)} of them), though each alone is finite: the "
        f"sum overflowed. {work.wider}. {advice}"
    )
