"""Captured rows on their way: those that a worker has, those that it is told of, as bytes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.data.batches import CapturedPositions
from ekfac_dist.passes.row_order import Entry

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


@dataclass(frozen=True)
class Note:
    """Describes rows to their owner before they arrive; sequences as of `ArrivedPositions`."""

    entry: Entry
    dtype: torch.dtype
    indices: tuple[int, ...]
    lengths: tuple[int, ...]
    offsets: np.ndarray | None


@dataclass
class Rows:
    """Rows of one entry that one worker has captured, and the positions that they are of."""

    entry: Entry
    values: Tensor
    positions: CapturedPositions

    @property
    def note(self) -> Note:
        """Their description, for their owner."""
        positions = self.positions
        return Note(
            self.entry,
            self.values.dtype,
            tuple(positions.indices),
            tuple(positions.lengths),
            positions.offsets,
        )


@dataclass
class Window:
    """The rows of a window that are sent, or are to be.

    Attributes:
        leaving: This worker's rows, by the place of their owner.
        notes: What comes to this worker, by the place of the sender.
        rounds: The rounds in which they travel; in a round of distance d a worker sends to the
            owner d places after its own, and its own rows stay where they are for d = 0.
        num_sent: Number of rounds that have begun.
    """

    leaving: list[list[Rows]]
    notes: Sequence[Sequence[Note]]
    rounds: Sequence[Sequence[int]]
    num_sent: int = 0


@dataclass
class Travelling:
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
    notes: Sequence[Sequence[Note]]
    arriving: Tensor
    sizes: Sequence[int]
    own: Sequence[Rows]
    work: Any
    sent: Tensor = field(repr=False)


def as_bytes(rows: Tensor) -> Tensor:
    """Rows as bytes, padded so that whatever follows them is aligned."""
    flat = rows.contiguous().view(-1).view(torch.uint8)
    return torch.nn.functional.pad(flat, (0, padded(flat.numel()) - flat.numel()))


def padded(num_bytes: int) -> int:
    """Bytes of an entry's rows with what is added for alignment."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
