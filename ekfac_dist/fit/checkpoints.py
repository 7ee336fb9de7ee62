"""What a pass has summed so far, saved by each worker now and then, and taken up again.

A worker's running sums, as they are, are the state of its part of a pass: saving them changes no
number, so a pass may be interrupted after any step and ends with the same bits. Parts lie in

    OUTPUT/state/<pass>/<generation>-<worker>-<steps>/
        0.safetensors, 1.safetensors, …    sums, and their loss
        numbers.safetensors                which sequences are in them
        part.json                          written last: counts, and each file's size and SHA-256

A generation is one way of sharing out what was left of a pass: among so many workers, in steps of
so many tokens. If a run goes on in the same way, each worker takes up its own part. If in another,
the parts that are there are kept as they are, what they lack is shared out anew, as the next
generation, and at the end they are added once, each by a worker that has it. A part that is lost or
damaged is only work to do again. Which parts count is in the journal before any part depends on it.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from ekfac_dist.data.batches import worker_batches
from ekfac_dist.data.examples import Examples
from ekfac_dist.factors.layout import STATE
from ekfac_dist.factors.sinks import FactorSink
from ekfac_dist.fit.saved_parts import LOSS, Identity, Part, Sums, write_part
from ekfac_dist.passes.state import PassState
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.processes import World

# Saving may take so much of a pass's time: the next comes after that many times what the last took.
_LEAST_RATIO = 50


class Checkpoints:
    """Makes the state of each pass; this kind saves nothing."""

    saves = False

    def begin(
        self, name: str, batches: Sequence[Sequence[int]], sums: Sums, of: str = ""
    ) -> PassState:
        """What a worker starts a pass with.

        Args:
            name: The pass.
            batches: Its share, if nothing is done yet.
            sums: Its running sums, which are zero; they take up what was saved.
            of: What the sums are made with beside model and data; of other sums nothing is kept.
        """
        return PassState(batches)

    def clear(self, name: str) -> None:
        """Forgets the states of a pass whose results are stored."""


class SavedCheckpoints(Checkpoints):
    """Saves states under the output directory.

    Args:
        output: The store's directory; each worker writes under it, on its own host.
        world: The workers.
        sink: Where the journal is.
        sequences: The run's sequences.
        step_tokens: Of a batch.
        minutes: Between two savings; 0: after every step.
    """

    saves = True

    def __init__(
        self,
        output: str | Path,
        world: World,
        sink: FactorSink,
        sequences: Examples,
        step_tokens: int,
        minutes: float,
    ) -> None:
        self._root = Path(output) / STATE
        self._world = world
        self._sink = sink
        self._sequences = sequences
        self._step_tokens = step_tokens
        self._minutes = minutes

    def begin(
        self, name: str, batches: Sequence[Sequence[int]], sums: Sums, of: str = ""
    ) -> PassState:
        """See `Checkpoints.begin`; a collective."""
        world, directory = self._world, self._root / name
        way = {"workers": world.size, "step_tokens": self._step_tokens, "of": of}
        record = self._sink.stored.records.get(f"shares {name}")
        latest: int = -1 if record is None else record["generation"]
        usable = record is not None and record["of"] == of
        parts = self._whole_parts(directory) if usable else {}
        holders = self._holders(parts)
        kept: list[str] = record["kept"] if record is not None and usable else []
        goes_on = (
            record is not None
            and all(record[key] == value for key, value in way.items())
            and all(part in holders for part in kept)
        )
        if not goes_on:
            kept = _kept(holders, kept, latest)
            # A run that replaces another's store leaves the states of that one as they are.
            latest = 1 + max(latest, *world.gather(_last_generation(directory)))
            told = {**way, "generation": latest, "kept": kept}
            world.on_main(lambda: self._sink.record(f"shares {name}", told))
        mine = [parts[part] for part in kept if holders[part] == world.rank]
        done = self._numbers(mine)
        if done:
            left = np.setdiff1d(np.arange(len(self._sequences)), list(done))
            shares = worker_batches(
                self._sequences.num_positions[left],
                self._step_tokens,
                world.size,
                world.rank,
                self._sequences.equal_above,
            )
            batches = [left[numbers].tolist() for numbers in shares]
        identity = Identity(self._sink.stored.run_id, latest, world.rank)
        state = _SavedState(directory, identity, batches, sums, mine, self._minutes, self._sink)
        for part in parts.values() if goes_on else ():
            if part.share == (latest, world.rank):
                state.take_up(part)
        state.is_resumed = any(world.gather(bool(mine) or state.steps > 0))
        return state

    def clear(self, name: str) -> None:
        """See `Checkpoints.clear`."""
        shutil.rmtree(self._root / name, ignore_errors=True)
        with suppress(OSError):
            self._root.rmdir()

    def _whole_parts(self, directory: Path) -> dict[str, Part]:
        """The newest part of each worker of each generation that this worker can read.

        Each is compared with its checksums by one of the workers that see it: its own, if it can.
        """
        world = self._world
        newest: dict[tuple[int, int], Part] = {}
        if directory.is_dir():
            for entry in sorted(directory.iterdir()):
                part = Part.read(entry, self._sink.stored.run_id)
                if part is not None and part.steps > getattr(newest.get(part.share), "steps", -1):
                    newest[part.share] = part
        seen = {part.name: part for part in newest.values()}
        seen_by = [set(names) for names in world.gather(list(seen))]
        checked = {}
        for name, part in seen.items():
            who = [rank for rank, names in enumerate(seen_by) if name in names]
            if world.rank == (part.rank if part.rank in who else who[0]):
                checked[name] = part.is_whole()
        broken = {n for told in world.gather(checked) for n, whole in told.items() if not whole}
        return {name: part for name, part in seen.items() if name not in broken}

    def _holders(self, parts: Mapping[str, Part]) -> dict[str, int]:
        """Which worker adds each part: the first that sees it. The same on every worker."""
        holders: dict[str, int] = {}
        for rank, names in enumerate(self._world.gather(list(parts))):
            for name in names:
                holders.setdefault(name, rank)
        return dict(sorted(holders.items()))

    def _numbers(self, parts: Sequence[Part]) -> set[int]:
        """Sequences that are in the kept parts of all workers."""
        own = [part.numbers() for part in parts]
        return {n for some in self._world.gather(own) for one in some for n in one}


class _SavedState(PassState):
    """A pass of one worker whose sums are saved in a directory."""

    def __init__(
        self,
        directory: Path,
        identity: Identity,
        batches: Sequence[Sequence[int]],
        sums: Sums,
        kept: Sequence[Part],
        minutes: float,
        sink: FactorSink,
    ) -> None:
        super().__init__(batches)
        self._directory, self._identity, self._sink = directory, identity, sink
        self._all, self._sums, self._kept = batches, sums, kept
        self._interval = 60 * minutes
        self._least_interval = 0.0
        self.steps = self._saved_steps = 0
        self._start = self._last = time.monotonic()

    def take_up(self, part: Part) -> None:
        """Goes on where a part of this very share ends."""
        for name, tensor in part.tensors():
            if name == LOSS:
                self.loss = tensor.item()
            else:
                self._sums.take_up(name, tensor)
        self._sums.counts.update(part.counts)
        self._sums.num_added.update(part.num_added)
        self.steps = self._saved_steps = part.steps
        self.num_labels, self.seconds = part.num_labels, part.seconds
        self.batches = self._all[part.steps :]

    def after_step(self) -> None:
        self.steps += 1

    def is_due(self) -> bool:
        since = time.monotonic() - self._last
        return since >= max(self._interval, self._least_interval)

    def save(self, loss: float, num_labels: int, *, ends: bool) -> None:
        start = time.monotonic()
        self.leave(loss, num_labels)
        self._last = time.monotonic()
        self._least_interval = _LEAST_RATIO * (self._last - start) if self._interval else 0.0
        if ends:
            raise preemption.ended("the state of the pass is stored")

    def leave(self, loss: float, num_labels: int) -> None:
        if self.steps > self._saved_steps:
            self._write(loss, num_labels)
        self._sink.after_save()  # this worker's; or, where it has none and the run ends, another's

    def _write(self, loss: float, num_labels: int) -> None:
        own = self._identity
        directory = self._directory / f"{own.generation}-{own.rank}-{self.steps}"
        write_part(
            directory,
            own,
            self._sums,
            loss,
            [n for batch in self._all[: self.steps] for n in batch],
            steps=self.steps,
            num_labels=num_labels,
            seconds=self.seconds + time.monotonic() - self._start,
        )
        self._saved_steps = self.steps
        for older in self._directory.glob(f"{own.generation}-{own.rank}-*"):
            if older != directory:
                shutil.rmtree(older, ignore_errors=True)

    def complete(self) -> tuple[float, int]:
        loss, num_labels = 0.0, 0
        for part in self._kept:
            for name, tensor in part.tensors():
                if name == LOSS:
                    loss += tensor.item()
                else:
                    self._sums.add(name, tensor)
            for name, count in part.counts.items():
                self._sums.counts[name] += count
            num_labels += part.num_labels
            self.seconds = max(self.seconds, part.seconds)
        return loss, num_labels


def _last_generation(directory: Path) -> int:
    """The largest number of a generation of which there is a state, of any run; −1: of none."""
    names = [entry.name.partition("-")[0] for entry in directory.glob("*-*-*")]
    return max((int(name) for name in names if name.isdigit()), default=-1)


def _kept(holders: Mapping[str, int], kept: Sequence[str], latest: int) -> list[str]:
    """What the next generation builds on: what the latest did, and the latest's own parts.

    Workers of several hosts may each have one of the same share: the one with most steps counts.
    """
    newest: dict[tuple[int, int], tuple[int, str]] = {}
    for name in holders:
        generation, rank, steps = map(int, name.split("-"))
        if generation == latest:
            share = generation, rank
            newest[share] = max(newest.get(share, (-1, "")), (steps, name))
    return [name for name in kept if name in holders] + [name for _, name in newest.values()]
