"""The exchange of captured rows: a position's input or output-gradient travels to its owner.

Each worker runs its own batch; a module's rows of all workers of a copy are added up by the worker
that owns the module's family. An exchange is an observer that collects a worker's rows, sends them,
and shows what arrives to the observer of the modules that this worker owns.

    forward    window 1 │ window 2 │ …       a window: a few families, shared out among all owners
                        └─ rows of window 1 travel while window 2 is computed,
                           and are summed while those of window 2 travel
    backward   … │ window 2 │ window 1          the same with output-gradients

Windows are exchanged in one order on all workers, whatever a worker's batch has: rows that come
after their window has left, and those of a worker that has no batch left, change nothing in it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.data.batches import CapturedPositions
from ekfac_dist.models.capture.hooks import Capture
from ekfac_dist.models.capture.labels import LabelRule
from ekfac_dist.models.capture.observers import Observer, owned
from ekfac_dist.models.find.faults import is_routed
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.models.sharding import is_sharded
from ekfac_dist.passes.context import PassContext
from ekfac_dist.passes.owners import Owners, families, windows

T = TypeVar("T")
INPUT, GRADIENT = "input", "gradient"
Entry = tuple[str, str]  # a module's name, and INPUT or GRADIENT

_ALIGNMENT = 16  # bytes; rows of any dtype begin at a multiple of it


@dataclass(frozen=True)
class ArrivedPositions:
    """Positions of the batch of the worker that sent them.

    Attributes:
        indices: Index in the source of each sequence that has any.
        lengths: Positions of each of these sequences.
        offsets: Offset of each position in its sequence [M]; None: every sequence is complete.
        sender: The place of that worker.
    """

    indices: tuple[int, ...]
    lengths: tuple[int, ...]
    offsets: np.ndarray | None
    sender: int
    are_copies = True

    @property
    def num_positions(self) -> int:
        """M."""
        return sum(self.lengths)


class _Noted:
    """An observer that notes in which order a step shows which rows, and their dtypes."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.dtypes: dict[Entry, torch.dtype] = {}
        self.partial: set[str] = set()

    def on_input(
        self, module: TrackedModule, acts_Mi: Tensor, positions: CapturedPositions
    ) -> None:
        """Notes an input."""
        self.order.append(module.input)
        self._note((module.name, INPUT), acts_Mi, positions)

    def on_gradient(
        self, module: TrackedModule, grads_MO: Tensor, positions: CapturedPositions
    ) -> None:
        """Notes an output-gradient."""
        self._note((module.name, GRADIENT), grads_MO, positions)

    def _note(self, entry: Entry, rows: Tensor, positions: CapturedPositions) -> None:
        self.dtypes[entry] = rows.dtype
        if positions.offsets is not None:
            self.partial.add(entry[0])


@dataclass(frozen=True)
class Schedule:
    """In which order rows are exchanged; the same on every worker.

    Attributes:
        slots: What travels together: the inputs of each window, then the output-gradients.
        places: The place of each module's owner.
        routed: Names of modules that see only some of a batch's positions, or an unknown part.
        dtypes: Dtype of each module's rows, where it is the same in every step.
    """

    slots: Sequence[Sequence[Entry]]
    places: Mapping[str, int]
    routed: frozenset[str]
    dtypes: Mapping[Entry, torch.dtype]

    @classmethod
    def of(
        cls, context: PassContext, modules: Sequence[TrackedModule], owners: Owners
    ) -> "Schedule":
        """The schedule of some modules, from a step of a short sequence; a collective.

        Args:
            context: Model, data and workers.
            modules: The modules, in model order.
            owners: The mesh.
        """
        noted = _Noted()
        with Capture(context.model, modules, noted, None, context.task) as capture:
            capture.run(context.shortest_batch(), LabelRule("data", 0, 0))
        order, dtypes, partial = context.world.share((noted.order, noted.dtypes, noted.partial))
        routed = partial | {m.name for m in modules if is_routed(context.model, m)}
        routed |= {m.name for m in modules if (m.name, GRADIENT) not in dtypes}
        members = families(modules)
        # Families that the short sequence did not reach stay behind those before them.
        place, places = -1.0, {}
        for name in members:
            place = order.index(name) if name in order else place
            places[name] = place
        ordered = [m for name in sorted(members, key=places.__getitem__) for m in members[name]]
        inputs, gradients = [], []
        for window in windows(ordered, owners.shard):
            inputs.append([(members[name][0].name, INPUT) for name in window])
            called = [module for name in window for module in members[name]]
            gradients.append([(module.name, GRADIENT) for module in reversed(called)])
        return cls(
            [*inputs, *reversed(gradients)],
            {module.name: owners.places[module.input] for module in modules},
            frozenset(routed),
            dtypes,
        )


@dataclass
class _Rows:
    """Rows of one entry that one worker has captured, and what they are of."""

    entry: Entry
    values: Tensor
    positions: CapturedPositions

    @property
    def note(self) -> "_Note":
        """What another worker has to know of them."""
        positions = self.positions
        return _Note(
            self.entry,
            self.values.dtype,
            tuple(positions.indices),
            tuple(positions.lengths),
            positions.offsets,
        )


@dataclass(frozen=True)
class _Note:
    """What the owner of rows has to know of them before they come."""

    entry: Entry
    dtype: torch.dtype
    indices: tuple[int, ...]
    lengths: tuple[int, ...]
    offsets: np.ndarray | None


@dataclass
class _Travelling:
    """Rows on their way to this worker.

    Attributes:
        notes: What comes from each place, in order.
        arriving: The bytes, place after place.
        sizes: Number of bytes from each place.
        own: This worker's own rows, which travel nowhere.
        work: Ends when all bytes are there, and those that were sent have left.
        leaving: The bytes that are sent, held until then.
    """

    notes: Sequence[Sequence[_Note]]
    arriving: Tensor
    sizes: Sequence[int]
    own: Sequence[_Rows]
    work: Any
    leaving: Tensor = field(repr=False)


class RowExchange:
    """Sends captured rows to their owners, and shows owners the rows of all workers of a copy.

    Args:
        context: Model, data and workers.
        modules: The tracked modules of the pass.
        observer: Takes the rows of the modules that this worker owns.
        owners: The mesh.
        batches: This worker's batches.

    Attributes:
        dtype: What the observer is given; None: as captured.
    """

    def __init__(
        self,
        context: PassContext,
        modules: Sequence[TrackedModule],
        observer: Observer,
        owners: Owners,
        batches: Sequence[Sequence[int]],
    ) -> None:
        self.dtype: torch.dtype | None = None
        self._sequences = context.sequences
        self._modules = {module.name: module for module in modules}
        self._observer, self._owners = observer, owners
        self._batches = owners.notes.gather(batches)
        schedule = self._schedule = Schedule.of(context, modules, owners)
        self._slot_of = {
            entry: number for number, slot in enumerate(schedule.slots) for entry in slot
        }
        self._step = self._slot = 0
        self._rows: dict[Entry, _Rows] = {}
        self._late: list[_Rows] = []
        self._late_families: set[str] = set()
        self._travelling: _Travelling | None = None
        # Between the layers of a sharded model, which are collectives, all workers have to exchange
        # the same; but which experts a worker's batch reaches, and when, is its own.
        self._only_at_end = is_sharded(context.model) and bool(schedule.routed)
        self._is_idle = False

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Has no rows of its own to send in a step, but takes part in what is exchanged in it."""
        self._is_idle = True
        try:
            yield
        finally:
            self._is_idle = False

    # -- what the capture shows --------------------------------------------------------------------

    def on_input(
        self, module: TrackedModule, acts_Mi: Tensor, positions: CapturedPositions
    ) -> None:
        """Takes an input; see `Observer.on_input`."""
        self._take(_Rows((module.name, INPUT), owned(acts_Mi, positions), positions), module)

    def on_gradient(
        self, module: TrackedModule, grads_MO: Tensor, positions: CapturedPositions
    ) -> None:
        """Takes an output-gradient; see `Observer.on_gradient`."""
        self._take(_Rows((module.name, GRADIENT), owned(grads_MO, positions), positions), module)

    def _take(self, rows: _Rows, module: TrackedModule) -> None:
        slot = self._slot_of[rows.entry]
        if slot < self._slot or module.input in self._late_families:
            # A late input's gradients come after it.
            self._late_families.add(module.input)
            if not self._is_idle:
                self._late.append(rows)
            return
        while self._slot < slot and not self._only_at_end:
            self._send_slot()
        if not self._is_idle:
            self._rows[rows.entry] = rows

    def end_step(self) -> None:
        """Exchanges what is left of a step, which may be all; every worker does as many steps."""
        while self._slot < len(self._schedule.slots):
            self._send_slot()
        if any(self._gathered(bool(self._late))):
            self._send(self._late, self._gathered([rows.note for rows in self._late]))
        self._settle()
        self._rows.clear()
        self._late.clear()
        self._late_families.clear()
        self._step += 1
        self._slot = 0

    # -- sending -----------------------------------------------------------------------------------

    def _send_slot(self) -> None:
        """Sends the next slot, then shows what came with the one before."""
        slot = self._schedule.slots[self._slot]
        own = [self._rows.pop(entry) for entry in slot if entry in self._rows]
        if any(name in self._schedule.routed for name, _ in slot):
            notes = self._gathered([rows.note for rows in own])
        else:
            notes = [self._expected(slot, batches) for batches in self._batches]
        self._slot += 1
        self._send(own, notes)

    def _expected(self, slot: Sequence[Entry], batches: Sequence[Sequence[int]]) -> list[_Note]:
        """What a worker sends that captures every position of its batch."""
        if self._step >= len(batches):
            return []
        batch = list(batches[self._step])
        notes = []
        for entry in slot:
            lengths = self._sequences.positions_of(entry[0])[batch]
            indices = tuple(self._sequences.indices[batch].tolist())
            note = _Note(
                entry, self._schedule.dtypes[entry], indices, tuple(lengths.tolist()), None
            )
            notes += [note] * (sum(note.lengths) > 0)
        return notes

    def _send(self, own: Sequence[_Rows], notes: Sequence[Sequence[_Note]]) -> None:
        """Sends rows to their owners.

        Args:
            own: This worker's rows.
            notes: What every worker of the copy sends, in order.
        """
        place, places = self._owners.place, self._schedule.places
        leaving: list[list[Tensor]] = [[] for _ in range(self._owners.shard)]
        for rows in own:
            owner = places[rows.entry[0]]
            if owner != place:
                leaving[owner].append(_as_bytes(rows.values))
        arriving = [
            [note for note in of_worker if places[note.entry[0]] == place] for of_worker in notes
        ]
        sizes = [
            0 if other == place else sum(map(self._num_bytes, of_worker))
            for other, of_worker in enumerate(arriving)
        ]
        sent = [part for parts in leaving for part in parts]
        nothing = torch.empty(0, dtype=torch.uint8, device=self._owners.copy.device)
        sent_bytes = torch.cat(sent) if sent else nothing
        arriving_bytes = nothing.new_empty(sum(sizes))
        work = self._owners.copy.all_to_all(
            arriving_bytes,
            sent_bytes,
            sizes,
            [sum(part.numel() for part in parts) for parts in leaving],
        )
        kept = [rows for rows in own if places[rows.entry[0]] == place]
        travelling = _Travelling(arriving, arriving_bytes, sizes, kept, work, sent_bytes)
        self._settle()
        self._travelling = travelling

    def _gathered(self, value: T) -> list[T]:
        """Every worker's value, of this worker's copy, by place."""
        return self._owners.notes.gather(value)

    def _num_bytes(self, note: _Note) -> int:
        return _padded(sum(note.lengths) * self._width(note.entry) * note.dtype.itemsize)

    def _width(self, entry: Entry) -> int:
        module = self._modules[entry[0]]
        return module.num_inputs if entry[1] == INPUT else module.num_outputs

    # -- arriving ----------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Waits for the rows that travel, and shows them to the observer."""
        travelling, self._travelling = self._travelling, None
        if travelling is None:
            return
        self._owners.copy.wait(travelling.work)
        parts = travelling.arriving.split(list(travelling.sizes))
        for sender, (notes, part) in enumerate(zip(travelling.notes, parts, strict=True)):
            if sender == self._owners.place:
                for rows in travelling.own:
                    note = rows.note
                    self._show(note, rows.values, sender)
                continue
            start = 0
            for note in notes:
                size = sum(note.lengths) * self._width(note.entry) * note.dtype.itemsize
                values = part[start : start + size].view(note.dtype)
                self._show(note, values.view(-1, self._width(note.entry)), sender)
                start += _padded(size)

    def _show(self, note: _Note, values: Tensor, sender: int) -> None:
        name, side = note.entry
        show = self._observer.on_input if side == INPUT else self._observer.on_gradient
        positions = ArrivedPositions(note.indices, note.lengths, note.offsets, sender)
        show(self._modules[name], values.to(self.dtype or values.dtype), positions)


def _as_bytes(rows: Tensor) -> Tensor:
    """Rows as bytes, padded so that whatever follows them is aligned."""
    flat = rows.contiguous().view(-1).view(torch.uint8)
    return torch.nn.functional.pad(flat, (0, _padded(flat.numel()) - flat.numel()))


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
