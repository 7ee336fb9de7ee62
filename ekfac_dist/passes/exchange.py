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

The end of a step is not waited for either: its last rows are summed while the next step is
computed, before any row of that one.
"""

import math
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from ekfac_dist.data.batches import CapturedPositions
from ekfac_dist.errors import ModelError
from ekfac_dist.models.capture.observers import Observer, owned
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.models.sharding import is_sharded
from ekfac_dist.passes.context import PassContext
from ekfac_dist.passes.owners import Owners
from ekfac_dist.passes.row_order import GRADIENT, INPUT, Entry
from ekfac_dist.passes.schedule import Schedule, num_rounds
from ekfac_dist.passes.travelling_rows import (
    ArrivedPositions,
    Note,
    Rows,
    Travelling,
    Window,
    as_bytes,
    padded,
)

T = TypeVar("T")
MOST_TRAVELLING = 2  # rounds that nobody waits for


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
        largest = int(most_positions * schedule.largest_window)
        self._num_rounds = num_rounds(largest, owners.shard)
        self._step = self._number = 0  # of the step, and of the window that is collected
        self._num_taken = 0  # rows of that window so far
        self._rows: dict[Entry, Rows] = {}
        self._late: list[Rows] = []
        self._late_families: set[str] = set()
        self._window: Window | None = None
        # Rounds that nobody was shown yet, and what is to be done after those before it.
        self._waiting: deque[Travelling | Callable[[], None]] = deque()
        self._num_travelling = 0  # rounds among these
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
        self._take(Rows((module.name, INPUT), owned(acts_Mi, positions), positions), module)

    def on_gradient(
        self, module: TrackedModule, grads_MO: Tensor, positions: CapturedPositions
    ) -> None:
        """Takes an output-gradient; see `Observer.on_gradient`."""
        self._take(Rows((module.name, GRADIENT), owned(grads_MO, positions), positions), module)

    def _take(self, rows: Rows, module: TrackedModule) -> None:
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

    def end_step(self, then: Callable[[], None]) -> None:
        """Sends what is left of a step, which may be all; every worker does as many steps.

        Args:
            then: Called once the observer was shown all rows of the step, and none of a later one,
                which may be while a later step is computed.
        """
        while self._number < len(self._schedule.windows):
            self._close_window()
        self._send_rounds(self._num_rounds)
        # Without experts a window is closed with all of its rows, and none is late.
        if self._schedule.routed and any(self._gathered(bool(self._late))):
            self._begin(self._late, self._gathered([rows.note for rows in self._late]))
            self._send_rounds(self._num_rounds)
        self._waiting.append(then)
        self._settle(MOST_TRAVELLING)
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
            self._require_all({rows.entry for rows in own}, notes[self._owners.place])
        self._number += 1
        self._num_taken = 0
        self._begin(own, notes)

    def _require_all(self, captured: Container[Entry], expected: Sequence[Note]) -> None:
        """Refuses a batch in which a module had no rows, which others wait for."""
        for note in expected:
            if note.entry not in captured:
                raise ModelError(
                    f"Module {note.entry[0]} was not used in this forward. Leave it out with "
                    "model.modules."
                )

    def _expected(self, window: Sequence[Entry], batches: Sequence[Sequence[int]]) -> list[Note]:
        """What a worker sends that captures every position of its batch."""
        if self._step >= len(batches):
            return []
        batch = list(batches[self._step])
        notes = []
        for entry in window:
            lengths = self._sequences.positions_of(entry[0])[batch]
            indices = tuple(self._sequences.indices[batch].tolist())
            note = Note(entry, self._schedule.dtypes[entry], indices, tuple(lengths.tolist()), None)
            notes += [note] * (sum(note.lengths) > 0)
        return notes

    def _begin(self, own: Sequence[Rows], notes: Sequence[Sequence[Note]]) -> None:
        """Prepares rows for sending; those before them have been sent.

        Args:
            own: This worker's rows.
            notes: What every worker of the copy sends, in order.
        """
        places, shard = self._schedule.places, self._owners.shard
        leaving: list[list[Rows]] = [[] for _ in range(shard)]
        for rows in own:
            leaving[places[rows.entry[0]]].append(rows)
        arriving = [
            [note for note in of_worker if places[note.entry[0]] == self._owners.place]
            for of_worker in notes
        ]
        bounds = [shard * k // self._num_rounds for k in range(self._num_rounds + 1)]
        rounds = [range(*bounds[k : k + 2]) for k in range(self._num_rounds)]
        self._window = Window(leaving, arriving, rounds)

    def _send_rounds(self, number: int) -> None:
        """Begins the rounds of the closed window up to a number of them."""
        window = self._window
        while window is not None and window.num_sent < number:
            self._send(window, window.rounds[window.num_sent])
            window.num_sent += 1

    def _send(self, window: Window, distances: Sequence[int]) -> None:
        """Begins one round, then shows what came with those before."""
        place, shard = self._owners.place, self._owners.shard
        senders = [(place - distance) % shard for distance in distances]
        leaving: list[list[Tensor]] = [[] for _ in range(shard)]
        own: list[Rows] = []
        for distance in distances:
            owner = (place + distance) % shard
            rows, window.leaving[owner] = window.leaving[owner], []
            if owner == place:
                own = rows
            else:
                leaving[owner] = [as_bytes(each.values) for each in rows]
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
        travelling = Travelling(senders, window.notes, arriving, sizes, own, work, sent)
        self._waiting.append(travelling)
        self._num_travelling += 1
        self._settle(MOST_TRAVELLING)

    def _gathered(self, value: T) -> list[T]:
        """Every worker's value, of this worker's copy, by place."""
        return self._owners.notes.gather(value)

    def _num_bytes(self, note: Note) -> int:
        return padded(sum(note.lengths) * self._width(note.entry) * note.dtype.itemsize)

    def _width(self, entry: Entry) -> int:
        module = self._modules[entry[0]]
        return module.num_inputs if entry[1] == INPUT else module.num_outputs

    # -- arriving ----------------------------------------------------------------------------------

    def settle(self) -> None:
        """Waits for all rows that were sent, and shows them to the observer."""
        self._settle(0)

    def _settle(self, most: int) -> None:
        """Shows the observer the rows that have arrived, and waits for others if they are too many.

        Args:
            most: Rounds that may still travel afterwards.
        """
        waiting = self._waiting
        while waiting:
            first = waiting[0]
            if not isinstance(first, Travelling):
                waiting.popleft()
                first()
            elif self._num_travelling > most or first.work.is_completed():
                waiting.popleft()
                self._num_travelling -= 1
                self._show_all(first)
            else:
                return

    def _show_all(self, travelling: Travelling) -> None:
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
                start += padded(size)

    def _show(self, note: Note, values: Tensor, sender: int) -> None:
        name, side = note.entry
        show = self._observer.on_input if side == INPUT else self._observer.on_gradient
        positions = ArrivedPositions(note.indices, note.lengths, note.offsets, sender)
        show(self._modules[name], values.to(self.dtype or values.dtype), positions)
