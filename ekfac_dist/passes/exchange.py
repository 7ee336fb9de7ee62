"""The exchange of captured rows: a position's input or output-gradient travels to its owner.

Each worker runs its own batch; a module's rows of all workers of a copy are added up by the worker
that owns the module's family. An exchange is an observer that collects a worker's rows, sends them,
and shows what arrives to the observer of the modules that this worker owns.

    forward    window 1 │ window 2 │ …       a window: a few layers, shared out among all owners
                        └─ rows of window 1 travel while window 2 is computed,
                           and are summed while those of window 2 travel
    backward   … │ window 2 │ window 1          the same with output-gradients

In a window one worker may send much and another little, and the other way round in the next. So
rows that have not arrived in time are not waited for while only few are on their way.

Large windows travel in rounds, so that little of them is held twice. In a round every worker sends
to as many owners as it receives from senders, so all links are used alike:

    distance       0           1           2          …        W = 4, D = 4
    rank 0 sends   (its own)   to rank 1   to rank 2
    rank 3 sends   (its own)   to rank 0   to rank 1

Windows are exchanged in one order on all workers, whatever a worker's batch has: rows that come
after their window has left, and those of a worker that has no batch left, change nothing in it.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.data.batches import CapturedPositions
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
_ROUND_BYTES = 2**27  # a round of fewer would be mostly latency
MOST_TRAVELLING = 2  # rounds that nobody waits for


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
        self.inputs: list[str] = []  # in the order in which they are shown
        self.num_inputs_before_gradients: int | None = None
        self.dtypes: dict[Entry, torch.dtype] = {}
        self.partial: set[str] = set()

    def on_input(
        self, module: TrackedModule, acts_Mi: Tensor, positions: CapturedPositions
    ) -> None:
        """Notes an input."""
        self.inputs.append(module.input)
        self._note((module.name, INPUT), acts_Mi, positions)

    def on_gradient(
        self, module: TrackedModule, grads_MO: Tensor, positions: CapturedPositions
    ) -> None:
        """Notes an output-gradient."""
        if self.num_inputs_before_gradients is None:
            self.num_inputs_before_gradients = len(self.inputs)
        self._note((module.name, GRADIENT), grads_MO, positions)

    def _note(self, entry: Entry, rows: Tensor, positions: CapturedPositions) -> None:
        self.dtypes[entry] = rows.dtype
        if positions.offsets is not None:
            self.partial.add(entry[0])


@dataclass(frozen=True)
class Schedule:
    """In which order rows are exchanged; the same on every worker.

    Attributes:
        windows: What is exchanged together: the inputs of each window of families, then the
            output-gradients. Inputs that only the backward shows, in a forward that is repeated for
            it, come with their gradients.
        places: The place of each module's owner.
        routed: Names of modules that see only some of a batch's positions, or an unknown part.
        dtypes: Dtype of each module's rows, where it is the same in every step.
    """

    windows: Sequence[Sequence[Entry]]
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
        with context.capture(modules, noted, None) as capture:
            capture.run(context.shortest_batch(), LabelRule("data", 0, 0))
        order, num_before = noted.inputs, noted.num_inputs_before_gradients
        order, num_before, dtypes, partial = context.world.share(
            (order, num_before, noted.dtypes, noted.partial)
        )
        routed = partial | {m.name for m in modules if is_routed(context.model, m)}
        routed |= {m.name for m in modules if (m.name, GRADIENT) not in dtypes}
        members = families(modules)
        in_forward = dict.fromkeys(order[:num_before], True) | dict.fromkeys(
            order[num_before:], False
        )
        # Families that the short sequence did not reach are like those before them.
        place, places = -1, {}
        is_early, early = True, set()
        for name in members:
            place = order.index(name) if name in in_forward else place
            places[name] = place
            is_early = in_forward.get(name, is_early)
            early |= {name} if is_early else set()
        if len(early) == len(members):  # in the order of the forward
            modules = [m for name in sorted(members, key=places.__getitem__) for m in members[name]]
        inputs, rest = [], []
        for window in windows(modules, owners.shard):
            first = {name: (members[name][0].name, INPUT) for name in window}
            called = [module for name in window for module in members[name]]
            inputs.append([first[name] for name in window if name in early])
            rest.append(
                [first[name] for name in window if name not in early]
                + [(module.name, GRADIENT) for module in reversed(called)]
            )
        return cls(
            [window for window in (*inputs, *reversed(rest)) if window],
            {module.name: owners.places[module.input] for module in modules},
            frozenset(routed),
            dtypes,
        )


@dataclass
class _Rows:
    """Rows of one entry that one worker has captured, and the positions that they are of."""

    entry: Entry
    values: Tensor
    positions: CapturedPositions

    @property
    def note(self) -> "_Note":
        """Their description, for their owner."""
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
    """Describes rows to their owner before they arrive; sequences as of `ArrivedPositions`."""

    entry: Entry
    dtype: torch.dtype
    indices: tuple[int, ...]
    lengths: tuple[int, ...]
    offsets: np.ndarray | None


@dataclass
class _Window:
    """The rows of a window that are sent, or are to be.

    Attributes:
        leaving: This worker's rows, by the place of their owner.
        notes: What comes to this worker, by the place of the sender.
        rounds: The rounds in which they travel; in a round of distance d a worker sends to the
            owner d places after its own, and its own rows stay where they are for d = 0.
        num_sent: Number of rounds that have begun.
    """

    leaving: list[list[_Rows]]
    notes: Sequence[Sequence[_Note]]
    rounds: Sequence[Sequence[int]]
    num_sent: int = 0


@dataclass
class _Travelling:
    """Rows on their way to this worker.

    Attributes:
        senders: The places that they come from, in the order in which they are shown.
        notes: What comes from each place.
        arriving: The bytes, place after place.
        sizes: Number of bytes from each place.
        own: This worker's own rows, which travel nowhere.
        work: Ends when all bytes are there, and those that were sent have left.
        sent: The bytes that are sent, held until then.
    """

    senders: Sequence[int]
    notes: Sequence[Sequence[_Note]]
    arriving: Tensor
    sizes: Sequence[int]
    own: Sequence[_Rows]
    work: Any
    sent: Tensor = field(repr=False)


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
        self._window_of = {
            entry: number for number, window in enumerate(schedule.windows) for entry in window
        }
        lengths = context.sequences.num_positions
        most_positions = max(
            (int(lengths[batch].sum()) for own in self._batches for batch in own), default=0
        )
        # All windows travel in as many rounds, so that every worker knows it without being told.
        largest = max(
            sum(
                most_positions * self._width(entry) * schedule.dtypes[entry].itemsize
                for entry in window
                if entry[0] not in schedule.routed
            )
            for window in schedule.windows
        )
        self._num_rounds = num_rounds(largest, owners.shard)
        self._step = self._number = 0  # of the step, and of the window that is collected
        self._num_taken = 0  # rows of that window so far
        self._rows: dict[Entry, _Rows] = {}
        self._late: list[_Rows] = []
        self._late_families: set[str] = set()
        self._window: _Window | None = None
        self._travelling: deque[_Travelling] = deque()
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
        number = self._window_of[rows.entry]
        if number < self._number or module.input in self._late_families:
            # A late input's gradients come after it.
            self._late_families.add(module.input)
            if not self._is_idle:
                self._late.append(rows)
            return
        if not self._is_idle:
            self._rows[rows.entry] = rows
        if self._only_at_end:
            return
        while self._number < number:
            self._close_window()
        self._num_taken += 1
        # The rows of the window before travel while this one is computed.
        part = self._num_taken / len(self._schedule.windows[number])
        self._send_rounds(math.ceil(part * self._num_rounds))

    def end_step(self) -> None:
        """Exchanges what is left of a step, which may be all; every worker does as many steps."""
        while self._number < len(self._schedule.windows):
            self._close_window()
        self._send_rounds(self._num_rounds)
        if any(self._gathered(bool(self._late))):
            self._begin(self._late, self._gathered([rows.note for rows in self._late]))
        self._send_rounds(self._num_rounds)
        self._settle(0)
        self._rows.clear()
        self._late.clear()
        self._late_families.clear()
        self._window = None
        self._step += 1
        self._number = self._num_taken = 0

    # -- sending -----------------------------------------------------------------------------------

    def _close_window(self) -> None:
        """Ends the collecting of a window's rows, which are sent while the next one is computed."""
        # Before anything is gathered: the order of collectives is the same on all workers.
        self._send_rounds(self._num_rounds)
        window = self._schedule.windows[self._number]
        own = [self._rows.pop(entry) for entry in window if entry in self._rows]
        if any(name in self._schedule.routed for name, _ in window):
            notes = self._gathered([rows.note for rows in own])
        else:
            notes = [self._expected(window, batches) for batches in self._batches]
        self._number += 1
        self._num_taken = 0
        self._begin(own, notes)

    def _expected(self, window: Sequence[Entry], batches: Sequence[Sequence[int]]) -> list[_Note]:
        """What a worker sends that captures every position of its batch."""
        if self._step >= len(batches):
            return []
        batch = list(batches[self._step])
        notes = []
        for entry in window:
            lengths = self._sequences.positions_of(entry[0])[batch]
            indices = tuple(self._sequences.indices[batch].tolist())
            note = _Note(
                entry, self._schedule.dtypes[entry], indices, tuple(lengths.tolist()), None
            )
            notes += [note] * (sum(note.lengths) > 0)
        return notes

    def _begin(self, own: Sequence[_Rows], notes: Sequence[Sequence[_Note]]) -> None:
        """Prepares rows for sending; those before them have been sent.

        Args:
            own: This worker's rows.
            notes: What every worker of the copy sends, in order.
        """
        places, shard = self._schedule.places, self._owners.shard
        leaving: list[list[_Rows]] = [[] for _ in range(shard)]
        for rows in own:
            leaving[places[rows.entry[0]]].append(rows)
        arriving = [
            [note for note in of_worker if places[note.entry[0]] == self._owners.place]
            for of_worker in notes
        ]
        bounds = [shard * k // self._num_rounds for k in range(self._num_rounds + 1)]
        rounds = [range(*bounds[k : k + 2]) for k in range(self._num_rounds)]
        self._window = _Window(leaving, arriving, rounds)

    def _send_rounds(self, number: int) -> None:
        """Begins the rounds of the closed window up to a number of them."""
        window = self._window
        while window is not None and window.num_sent < number:
            self._send(window, window.rounds[window.num_sent])
            window.num_sent += 1

    def _send(self, window: _Window, distances: Sequence[int]) -> None:
        """Begins one round, then shows what came with those before."""
        place, shard = self._owners.place, self._owners.shard
        senders = [(place - distance) % shard for distance in distances]
        leaving: list[list[Tensor]] = [[] for _ in range(shard)]
        own: list[_Rows] = []
        for distance in distances:
            owner = (place + distance) % shard
            rows, window.leaving[owner] = window.leaving[owner], []
            if owner == place:
                own = rows
            else:
                leaving[owner] = [_as_bytes(each.values) for each in rows]
            del rows
        sizes = [0] * shard
        for sender in senders:
            if sender != place:
                sizes[sender] = sum(map(self._num_bytes, window.notes[sender]))
        parts = [part for of_owner in leaving for part in of_owner]
        nothing = torch.empty(0, dtype=torch.uint8, device=self._owners.copy.device)
        sent = torch.cat(parts) if parts else nothing
        sent_sizes = [sum(part.numel() for part in of_owner) for of_owner in leaving]
        parts.clear()
        leaving.clear()
        arriving = nothing.new_empty(sum(sizes))
        work = self._owners.copy.all_to_all(arriving, sent, sizes, sent_sizes)
        travelling = _Travelling(senders, window.notes, arriving, sizes, own, work, sent)
        self._travelling.append(travelling)
        self._settle(MOST_TRAVELLING)

    def _gathered(self, value: T) -> list[T]:
        """Every worker's value, of this worker's copy, by place."""
        return self._owners.notes.gather(value)

    def _num_bytes(self, note: _Note) -> int:
        return _padded(sum(note.lengths) * self._width(note.entry) * note.dtype.itemsize)

    def _width(self, entry: Entry) -> int:
        module = self._modules[entry[0]]
        return module.num_inputs if entry[1] == INPUT else module.num_outputs

    # -- arriving ----------------------------------------------------------------------------------

    def _settle(self, most: int) -> None:
        """Shows the observer the rows that have arrived, and waits for others if they are too many.

        Args:
            most: Rounds that may still travel afterwards.
        """
        waiting = self._travelling
        while waiting and (len(waiting) > most or waiting[0].work.is_completed()):
            self._show_all(waiting.popleft())

    def _show_all(self, travelling: _Travelling) -> None:
        """Shows the observer the rows of a round, once they are there."""
        self._owners.copy.wait(travelling.work)
        parts = travelling.arriving.split(list(travelling.sizes))
        for sender in travelling.senders:
            if sender == self._owners.place:
                for rows in travelling.own:
                    self._show(rows.note, rows.values, sender)
                continue
            start = 0
            for note in travelling.notes[sender]:
                size = sum(note.lengths) * self._width(note.entry) * note.dtype.itemsize
                values = parts[sender][start : start + size].view(note.dtype)
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


def num_rounds(window_bytes: int, shard: int) -> int:
    """In how many rounds the rows of a window travel: more where they are large, for the memory.

    Args:
        window_bytes: Bytes of one worker's rows of a window.
        shard: D.
    """
    return max(1, min(shard - 1, window_bytes // _ROUND_BYTES))
