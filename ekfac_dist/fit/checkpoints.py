"""Saved states of a pass: each worker's running sums so far, from which an unfinished run resumes.

Running sums are saved as they are, so saving changes no value: a pass that is resumed in the same
way ends with the same bits. A worker's saved state is called a part, and lies in

    OUTPUT/state/<pass>/<generation>-<rank>-<steps>/
        0.safetensors, 1.safetensors, …    the sums, and their loss
        numbers.safetensors                indices of the sequences that are in them
        part.json                          written last: counts, and each file's size and SHA-256

A generation is one way of sharing out the remaining sequences: over so many workers, in steps of so
many tokens. A run that is resumed in the same way takes up each worker's own part. In another way,
it keeps the parts that exist, shares out the sequences that are in none of them anew, as the next
generation, and adds each part once at the end, on a worker that can read it. A part that is lost or
damaged costs only its work. Before any part depends on it, the journal says which parts count.

Where workers share out the sums of a copy, each has the sums of its own factors, over the sequences
of all. So their parts count only together: all of a copy, after the same step. A worker removes its
last part once all of its copy have the next one.
"""

import shutil
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ekfac_dist.data.batch_plan import plan_batches, worker_batches
from ekfac_dist.data.examples import Examples
from ekfac_dist.factors.layout import STATE
from ekfac_dist.factors.sinks import FactorSink
from ekfac_dist.fit.saved_parts import LOSS, Identity, Part, Sums, write_part
from ekfac_dist.passes.owners import Owners
from ekfac_dist.passes.state import PassState
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.logs import log_on_main
from ekfac_dist.runtime.processes import World

# Saving takes at most 1/50 of a pass: the next one waits for 50 times as long as the last took.
_LEAST_RATIO = 50


class Checkpoints:
    """Begins the state of each pass; this class saves nothing."""

    saves = False

    def begin(
        self,
        name: str,
        batches: Sequence[Sequence[int]],
        sums: Sums,
        owners: Owners,
        step_tokens: int,
        of: str = "",
    ) -> PassState:
        """A worker's state at the start of a pass.

        Args:
            name: The pass.
            batches: Its batches, if nothing was done yet, as indices of sequences.
            sums: Its running sums, still zero; what was saved is put into them.
            owners: Who holds which sums.
            step_tokens: Token budget of a batch.
            of: Identifies what the sums depend on beside model and data; parts with another value
                are ignored.
        """
        return PassState(batches)

    def clear(self, name: str) -> None:
        """Removes the saved states of a pass whose results are stored."""


class SavedCheckpoints(Checkpoints):
    """Saves the states of passes under the output directory.

    Args:
        output: The store's directory; each worker writes under it, on its own host.
        world: The workers.
        sink: Where the journal is.
        sequences: All sequences of the run.
        minutes: Time between two savings; 0: after every step.
    """

    saves = True

    def __init__(
        self,
        output: str | Path,
        world: World,
        sink: FactorSink,
        sequences: Examples,
        minutes: float,
    ) -> None:
        self._root = Path(output) / STATE
        self._world = world
        self._sink = sink
        self._sequences = sequences
        self._minutes = minutes

    def begin(
        self,
        name: str,
        batches: Sequence[Sequence[int]],
        sums: Sums,
        owners: Owners,
        step_tokens: int,
        of: str = "",
    ) -> PassState:
        """See `Checkpoints.begin`; a collective."""
        world, directory = self._world, self._root / name
        sharing = {
            "workers": world.size,
            "shard": owners.shard,
            "step_tokens": step_tokens,
            "of": of,
        }
        record = self._sink.stored.records.get(f"shares {name}")
        if record is not None:
            record = {"shard": 1, **record}  # not in those of earlier versions
        latest: int = -1 if record is None else record["generation"]
        usable = record is not None and record["of"] == of
        parts = self._whole_parts(directory) if usable else {}
        readers = self._readers(parts, owners)
        kept: list[str] = record["kept"] if record is not None and usable else []
        goes_on = (
            record is not None
            and all(record.get(key) == value for key, value in sharing.items())
            and all(part in readers for part in kept)
        )
        if record is not None and usable:
            self._log_lost(name, record, readers)
        if not goes_on:
            kept = _kept(readers, kept, latest)
            # Above those of a store that is being replaced, whose states are still there.
            latest = 1 + max(latest, *world.gather(_last_generation(directory)))
            outcome = {**sharing, "generation": latest, "kept": kept}
            world.on_main(lambda: self._sink.record(f"shares {name}", outcome))
        first_read = [parts[part] for part in kept if min(readers[part].values()) == world.rank]
        own_parts = [parts[part] for part in kept if world.rank in readers[part].values()]
        done = self._summed_sequences(first_read)
        if done:
            left = np.setdiff1d(np.arange(len(self._sequences)), list(done))
            shares = worker_batches(
                self._sequences.num_positions[left],
                step_tokens,
                world.size,
                world.rank,
                self._sequences.equal_above,
            )
            batches = [left[batch].tolist() for batch in shares]
        identity = Identity(self._sink.stored.run_id, latest, world.rank, owners.shard)
        state = _SavedState(
            directory,
            identity,
            batches,
            sums,
            own_parts,
            [part.name for part in first_read],
            owners.notes,
            self._minutes,
            self._sink,
        )
        own = next((p for p in parts.values() if p.share == (latest, world.rank)), None)
        if all(owners.notes.gather(goes_on and own is not None)) and own is not None:
            state.take_up(own)
        state.is_resumed = any(world.gather(bool(own_parts) or state.steps > 0))
        return state

    def clear(self, name: str) -> None:
        """See `Checkpoints.clear`."""
        shutil.rmtree(self._root / name, ignore_errors=True)
        with suppress(OSError):
            self._root.rmdir()

    def _whole_parts(self, directory: Path) -> dict[str, Part]:
        """The newest undamaged parts of each generation and copy that this worker can read.

        One worker that can read a part verifies its checksums: the part's own, if it is among them.
        """
        world = self._world
        readable: dict[str, Part] = {}
        if directory.is_dir():
            for entry in sorted(directory.iterdir()):
                part = Part.read(entry, self._sink.stored.run_id)
                if part is not None:
                    readable[part.name] = part
        shards_by_rank = world.gather({name: part.shard for name, part in readable.items()})
        copies = _newest_copies(
            {name: d for shards in shards_by_rank for name, d in shards.items()}
        )
        selected = {name for copy in copies for name in copy}
        readable = {name: part for name, part in readable.items() if name in selected}
        verified = {}
        for name, part in readable.items():
            ranks = [rank for rank, shards in enumerate(shards_by_rank) if name in shards]
            if world.rank == (part.rank if part.rank in ranks else ranks[0]):
                verified[name] = part.is_whole()
        damaged = {
            name
            for of_worker in world.gather(verified)
            for name, is_whole in of_worker.items()
            if not is_whole
        }
        lost = {name for copy in copies if damaged & set(copy) for name in copy}
        return {name: part for name, part in readable.items() if name not in lost}

    def _readers(self, parts: Mapping[str, Part], owners: Owners) -> dict[str, dict[int, int]]:
        """The ranks that add each part, by the part's name and the place of the sums in it.

        Each sum is added by the first worker that holds it and can read the part. Parts of a copy
        are left out if any has a sum that nobody can add.
        """
        own_places = {
            name: sorted({owners.place_of(each) for each in part.names} or {0})
            for name, part in parts.items()
        }
        readers: dict[str, dict[int, int]] = {}
        needed: dict[str, list[int]] = {}
        shards: dict[str, int] = {}
        reports = self._world.gather((own_places, {n: part.shard for n, part in parts.items()}))
        for rank, (places, part_shards) in enumerate(reports):
            shards |= part_shards
            needed |= places
            for name, of_part in places.items():
                if rank % owners.shard in of_part:
                    readers.setdefault(name, {}).setdefault(rank % owners.shard, rank)
        missing = {
            name for name, places in needed.items() if {*places} - readers.get(name, {}).keys()
        }
        lost = {name for copy in _newest_copies(shards) if missing & set(copy) for name in copy}
        return {name: readers[name] for name in sorted(needed) if name not in lost}

    def _log_lost(self, name: str, record: Mapping[str, Any], readers: Collection[str]) -> None:
        """Logs which saved states should be there, and cannot be read by any worker; a collective.

        Args:
            name: The pass.
            record: What the journal says of its last generation.
            readers: Names of the parts that can be read.
        """
        latest, missing = record["generation"], []
        if any(self._world.gather(_last_generation(self._root / name) == latest)):
            lengths, equal_above = self._sequences.num_positions, self._sequences.equal_above
            number = record["workers"]
            if record["shard"] == 1:  # a worker without a batch saves nothing
                batches = plan_batches(lengths, record["step_tokens"], equal_above)
                number = min(number, len(batches))
            read = {int(part.split("-")[1]) for part in readers if part.startswith(f"{latest}-")}
            missing = [str(rank) for rank in range(number) if rank not in read]
        number_lost = sum(part not in readers for part in record["kept"])
        lost = [f"{number_lost} of {len(record['kept'])} that it builds on"] * (number_lost > 0)
        if missing:
            workers = "worker" if len(missing) == 1 else "workers"
            lost.append(f"those of {workers} {', '.join(missing)} of {record['workers']}")
        if lost:
            log_on_main(
                self._world,
                f"saved states  {name}: {' and '.join(lost)} cannot be read by any worker"
                f"{', or not with all of their copy' if record['shard'] > 1 else ''}; what they "
                "hold is summed again",
            )

    def _summed_sequences(self, own_parts: Sequence[Part]) -> set[int]:
        """Indices of the sequences that are in the parts of all workers."""
        indices = [part.indices() for part in own_parts]
        return {n for of_worker in self._world.gather(indices) for part in of_worker for n in part}


class _SavedState(PassState):
    """A worker's place in a pass whose running sums are saved in a directory."""

    def __init__(
        self,
        directory: Path,
        identity: Identity,
        batches: Sequence[Sequence[int]],
        sums: Sums,
        kept: Sequence[Part],
        first_read: Collection[str],
        copy: World,
        minutes: float,
        sink: FactorSink,
    ) -> None:
        super().__init__(batches)
        self._directory, self._identity, self._sink = directory, identity, sink
        self._all, self._sums, self._kept = batches, sums, kept
        self._first_read, self._copy = first_read, copy
        self._interval = 60 * minutes
        self.is_always_due = minutes == 0
        self._least_interval = 0.0
        self.steps = self._saved_steps = 0
        self._start = self._last = time.monotonic()

    def take_up(self, part: Part) -> None:
        """Puts a part of this worker's own share into the sums, and continues after it."""
        keys = set()
        for name, tensor in part.tensors():
            keys.add(name)
            if name == LOSS:
                self.loss = tensor.item()
            else:
                self._sums.restore(name, tensor)
        self._sums.require_beside(keys)
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
        if self._copy.size > 1:
            self._copy.barrier()  # until all of the copy have saved this step
            self._remove_older()
        self._last = time.monotonic()
        self._least_interval = _LEAST_RATIO * (self._last - start) if self._interval else 0.0
        if ends:
            raise preemption.ended("the state of the pass is stored")

    def leave(self, loss: float, num_labels: int) -> None:
        if self.steps > self._saved_steps:
            self._write(loss, num_labels)
            if self._copy.size == 1:
                self._remove_older()
        self._sink.after_save()  # this worker's, or another's if it has none and the run ends

    def _write(self, loss: float, num_labels: int) -> None:
        write_part(
            self._directory / self._name,
            self._identity,
            self._sums,
            loss,
            [n for batch in self._all[: self.steps] for n in batch],
            steps=self.steps,
            num_labels=num_labels,
            seconds=self.seconds + time.monotonic() - self._start,
        )
        self._saved_steps = self.steps

    @property
    def _name(self) -> str:
        own = self._identity
        return f"{own.generation}-{own.rank}-{self.steps}"

    def _remove_older(self) -> None:
        own = self._identity
        for older in self._directory.glob(f"{own.generation}-{own.rank}-*"):
            if older.name != self._name:
                shutil.rmtree(older, ignore_errors=True)

    def complete(self) -> tuple[float, int]:
        loss, num_labels = 0.0, 0
        for part in self._kept:
            is_first = part.name in self._first_read
            keys = set()
            for name, tensor in part.tensors():
                keys.add(name)
                if name == LOSS:
                    loss += tensor.item() * is_first
                elif self._sums.holds(name):
                    self._sums.add(name, tensor)
            self._sums.require_beside(keys)
            for name in self._sums.counts.keys() & part.counts.keys():
                self._sums.counts[name] += part.counts[name]
            num_labels += part.num_labels * is_first
            self.seconds = max(self.seconds, part.seconds)
        return loss, num_labels


def _last_generation(directory: Path) -> int:
    """The largest generation of any saved state, of any run; −1 if there is none."""
    names = [entry.name.partition("-")[0] for entry in directory.glob("*-*-*")]
    return max((int(name) for name in names if name.isdigit()), default=-1)


def _newest_copies(shards: Mapping[str, int]) -> list[list[str]]:
    """Names of the parts of each copy after its newest step that all of its workers have saved.

    Args:
        shards: Names of parts, and how many workers share the copy that each is of.
    """
    saved: dict[tuple[int, int, int], dict[int, list[str]]] = {}
    for name, shard in shards.items():
        generation, rank, steps = map(int, name.split("-"))
        of_copy = saved.setdefault((generation, rank // shard, shard), {})
        of_copy.setdefault(steps, []).append(name)
    copies = []
    for (_, _, shard), of_copy in sorted(saved.items()):
        whole = [steps for steps, names in of_copy.items() if len(names) == shard]
        if whole:
            copies.append(sorted(of_copy[max(whole)]))
    return copies


def _kept(readers: Iterable[str], kept: Sequence[str], latest: int) -> list[str]:
    """Names of the parts that the next generation builds on: those kept, and the latest's."""
    names = list(readers)
    of_latest = [name for name in names if int(name.partition("-")[0]) == latest]
    return [name for name in kept if name in names] + of_latest
