"""Which sequences are computed together, and by whom: pure functions of their lengths.

Sequences are sorted by length and cut into batches under a token budget, so a batch is nearly free
of padding. For a given budget the batches do not depend on the number of workers: only who computes
which does. Every sequence is in exactly one batch, and every batch has exactly one worker.

    lengths   9 9 8 | 7 7 6 6 | 4 4 3 3 3 2 | …      budget 27
    worker    0       1         1              …      each batch to the worker with least to do
"""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

NO_LABEL = -100


def plan_batches(
    lengths: SequenceOf[int] | np.ndarray, batch_tokens: int, equal_above: int | None = None
) -> list[list[int]]:
    """Cuts sequences into batches, the longest first.

    Args:
        lengths: Positions of each sequence.
        batch_tokens: Largest number of sequences × longest sequence in a batch; a sequence that is
            longer alone is a batch alone.
        equal_above: Sequences longer than this share a batch only with others of their length;
            None: all may share one.

    Returns:
        Numbers of the sequences of each batch; together each number once.
    """
    lengths = np.asarray(lengths)
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    batches: list[list[int]] = []
    longest = 0
    for number in order.tolist():
        fits = batches and longest * (len(batches[-1]) + 1) <= batch_tokens
        if fits and may_share(longest, int(lengths[number]), equal_above):
            batches[-1].append(number)
        else:
            batches.append([number])
            longest = int(lengths[number])
    return batches


def may_share(one: int, other: int, equal_above: int | None) -> bool:
    """Whether sequences of two lengths may share a batch; see `plan_batches`."""
    return equal_above is None or one == other or max(one, other) <= equal_above


def assign_batches(costs: SequenceOf[int], num_workers: int) -> list[list[int]]:
    """Gives each batch to the worker with least to do so far, the costliest first.

    Args:
        costs: Cost of each batch.
        num_workers: W.

    Returns:
        Numbers of the batches of each worker, in ascending order; a worker may have none.
    """
    shards: list[list[int]] = [[] for _ in range(num_workers)]
    loads = [0] * num_workers
    for number in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        worker = loads.index(min(loads))
        shards[worker].append(number)
        loads[worker] += costs[number]
    return [sorted(shard) for shard in shards]


def padded_sizes(lengths: np.ndarray, batches: Iterable[SequenceOf[int]]) -> list[int]:
    """Sequences × longest sequence of each batch."""
    return [len(numbers) * int(lengths[numbers].max()) for numbers in batches]


def worker_batches(
    lengths: np.ndarray,
    batch_tokens: int,
    num_workers: int,
    worker: int,
    equal_above: int | None = None,
) -> list[list[int]]:
    """One worker's batches of all sequences, padding being what a batch costs.

    Args:
        lengths: Positions of each sequence.
        batch_tokens: As for `plan_batches`.
        num_workers: W.
        worker: Which of them.
        equal_above: As for `plan_batches`.

    Returns:
        Numbers of the sequences of each of its batches.
    """
    batches = plan_batches(lengths, batch_tokens, equal_above)
    costs = padded_sizes(lengths, batches)
    return [batches[k] for k in assign_batches(costs, num_workers)[worker]]


class Positions(Protocol):
    """Which rows belong to which sequence: all that running sums know of a batch."""

    @property
    def lengths(self) -> SequenceOf[int]:
        """Rows of each sequence, in order."""

    @property
    def num_positions(self) -> int:
        """All rows."""

    @property
    def real(self) -> Tensor | None:
        """Which rows were picked out of all that were captured; None: all, and not copied."""


class CapturedPositions(Positions, Protocol):
    """Which rows belong to which position of which sequence."""

    @property
    def indices(self) -> SequenceOf[int]:
        """Row in the source of each sequence that has some."""

    @property
    def offsets(self) -> np.ndarray | None:
        """Place of each row in its sequence; None: each sequence has all of its positions."""


@dataclass(frozen=True)
class Grid:
    """A batch's B sequences × T positions, padding included, and which of them are counted.

    Attributes:
        indices: Row in the source of each sequence [B].
        lengths: Counted positions of each sequence [B].
        shape: (B, T).
        real: Flat positions b·T + t that are counted, ascending [M]; None where all are.
        offsets: Place of each counted position among all of its sequence's [M]; None where the
            sequence has no others, and they stand in order.
    """

    indices: tuple[int, ...]
    lengths: tuple[int, ...]
    shape: tuple[int, int]
    real: Tensor | None
    offsets: np.ndarray | None = None

    @classmethod
    def of(
        cls, indices: SequenceOf[int], mask: np.ndarray, before: np.ndarray | None = None
    ) -> "Grid":
        """From a mask [B, T] that is true, or 1, where a position is counted.

        Args:
            indices: Row in the source of each sequence.
            mask: The mask.
            before: How many other positions each sequence has before these [B]; None: none.
        """
        mask = mask.astype(bool)
        lengths = tuple(mask.sum(1).tolist())
        real = None if mask.all() else torch.from_numpy(np.flatnonzero(mask))
        offsets = None
        if before is not None:
            starts = zip(before.tolist(), lengths, strict=True)
            offsets = np.concatenate([np.arange(start, start + n) for start, n in starts])
        return cls(tuple(indices), lengths, (mask.shape[0], mask.shape[1]), real, offsets)

    @property
    def num_positions(self) -> int:
        """Counted positions."""
        return sum(self.lengths)

    @property
    def size(self) -> int:
        """All positions, B·T."""
        return self.shape[0] * self.shape[1]

    def to(self, device: torch.device) -> "Grid":
        """The same grid on another device."""
        return replace(self, real=None if self.real is None else to_device(self.real, device))

    def routed(self, positions: Tensor) -> "RoutedPositions":
        """Which of some rows, that flat positions b·T + t are given of, are counted."""
        where = positions.cpu().numpy()
        counted = np.zeros(self.size, dtype=bool)
        counted[slice(None) if self.real is None else self.real.cpu().numpy()] = True
        order = np.argsort(where, kind="stable")
        real = order[counted[where[order]]]
        places = (np.cumsum(counted) - 1)[where[real]]  # among all counted positions
        starts = np.concatenate([[0], np.cumsum(self.lengths)])
        rows = np.searchsorted(starts, places, side="right") - 1
        offsets = places - starts[rows] if self.offsets is None else self.offsets[places]
        owners, lengths = np.unique(rows, return_counts=True)
        return RoutedPositions(
            tuple(self.indices[owner] for owner in owners),
            tuple(lengths.tolist()),
            torch.from_numpy(real).to(positions.device),
            offsets,
        )


@dataclass(frozen=True)
class RoutedPositions:
    """Rows of a batch that a module sees some of: of each sequence the positions routed to it.

    Attributes:
        indices: Row in the source of each sequence that has any.
        lengths: Captured positions of each of them.
        real: Which of the captured rows these are, sequence by sequence [M].
        offsets: Place of each in its sequence [M].
    """

    indices: tuple[int, ...]
    lengths: tuple[int, ...]
    real: Tensor
    offsets: np.ndarray

    @property
    def num_positions(self) -> int:
        """Rows of all sequences."""
        return len(self.offsets)


@dataclass(frozen=True)
class Labelled:
    """Where a batch's labels are, known on the host without asking the device.

    Attributes:
        flat: Flat places of `inputs["labels"]` that hold a label, ascending [L].
        rows: Which of the batch's sequences each belongs to [L].
        offsets: Its place in that sequence [L].
        smallest: The smallest label.
        largest: The largest.
        flat_at: `flat`, on the batch's device.
        rows_at: `rows`, on the batch's device.
    """

    flat: np.ndarray
    rows: np.ndarray
    offsets: np.ndarray
    smallest: int
    largest: int
    flat_at: Tensor
    rows_at: Tensor

    @classmethod
    def of(cls, labels: Tensor, spans: SequenceOf[int]) -> "Labelled":
        """Looks for labels, int64 in any shape; `spans` are the places of each sequence."""
        values = labels.detach().cpu().numpy().reshape(-1)
        flat = np.flatnonzero(values != NO_LABEL)
        ends = np.cumsum(spans)
        rows = np.searchsorted(ends, flat, side="right")
        found = values[flat] if flat.size else np.zeros(1, np.int64)
        on_host = cls(
            flat,
            rows,
            flat - (ends - np.asarray(spans))[rows],
            int(found.min()),
            int(found.max()),
            torch.from_numpy(flat),
            torch.from_numpy(rows),
        )
        return on_host.to(labels.device)

    def to(self, device: torch.device) -> "Labelled":
        """The same places for a batch on another device."""
        return replace(
            self,
            flat_at=to_device(self.flat_at, device),
            rows_at=to_device(self.rows_at, device),
        )


@dataclass(frozen=True)
class Batch:
    """Sequences padded or packed: what a task's forward takes, and what is counted of it.

    A packed batch has no padding: its sequences stand one after the other in one row, so every
    tensor is [1, M], and `position_ids` begin at 0 for each.

    Attributes:
        indices: Row in the source of each sequence [B].
        inputs: Tensors by name, [B, ...] each; [1, M] in a packed batch.
        grids: Positions that modules see, by the beginning of the modules' names; "" for the rest.
        labelled: Where the labels are; None: not known.
        packed: Lengths of the sequences of a packed batch [B]; None of one that is not.
    """

    indices: tuple[int, ...]
    inputs: Mapping[str, Tensor]
    grids: Mapping[str, Grid]
    labelled: Labelled | None = None
    packed: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls,
        indices: SequenceOf[int],
        inputs: Mapping[str, Tensor],
        grids: Mapping[str, Grid],
        packed: SequenceOf[int] | None = None,
    ) -> "Batch":
        """From tensors on the CPU, in which labels are looked for."""
        labels, labelled = inputs.get("labels"), None
        if labels is not None and not labels.is_floating_point():
            even = [labels.numel() // len(indices)] * len(indices)
            labelled = Labelled.of(labels, even if packed is None else packed)
        return cls(
            tuple(indices), inputs, grids, labelled, None if packed is None else tuple(packed)
        )

    @property
    def num_positions(self) -> int:
        """Counted positions of the batch."""
        return sum(grid.num_positions for grid in self.grids.values())

    def grid(self, module: str) -> Grid:
        """The positions that a module sees."""
        return self.grids[key_of(self.grids, module)]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return replace(
            self,
            inputs={name: to_device(tensor, device) for name, tensor in self.inputs.items()},
            grids={key: grid.to(device) for key, grid in self.grids.items()},
            labelled=None if self.labelled is None else self.labelled.to(device),
        )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on another device; to a GPU by way of pinned memory, which nothing waits for."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def key_of(keys: Iterable[str], module: str) -> str:
    """The longest of some names that a module is, or is in; "" is the whole model's."""
    return max((k for k in keys if not k or f"{module}.".startswith(f"{k}.")), key=len)
