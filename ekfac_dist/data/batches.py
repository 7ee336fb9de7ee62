"""Which sequences are computed together, and by whom: pure functions of their lengths.

Sequences are sorted by length and cut into batches under a token budget, so a batch is nearly free
of padding. The batches do not depend on the number of workers: only who computes which does. Every
sequence is in exactly one batch, and every batch has exactly one worker.

    lengths   9 9 8 | 7 7 6 6 | 4 4 3 3 3 2 | …      budget 27
    worker    0       1         1              …      each batch to the worker with least to do
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.data.sequences import NO_LABEL, Sequence


def plan_batches(lengths: SequenceOf[int] | np.ndarray, batch_tokens: int) -> list[list[int]]:
    """Cuts sequences into batches, the longest first.

    Args:
        lengths: Positions of each sequence.
        batch_tokens: Largest number of sequences × longest sequence in a batch; a sequence that is
            longer alone is a batch alone.

    Returns:
        Numbers of the sequences of each batch; together each number once.
    """
    lengths = np.asarray(lengths)
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    batches: list[list[int]] = []
    longest = 0
    for number in order.tolist():
        if batches and longest * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(number)
        else:
            batches.append([number])
            longest = int(lengths[number])
    return batches


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


def shard(lengths: np.ndarray, batch_tokens: int, num_workers: int, worker: int) -> list[list[int]]:
    """One worker's batches of all sequences, padding being what a batch costs.

    Args:
        lengths: Positions of each sequence.
        batch_tokens: As for `plan_batches`.
        num_workers: W.
        worker: Which of them.

    Returns:
        Numbers of the sequences of each of its batches.
    """
    batches = plan_batches(lengths, batch_tokens)
    costs = [len(numbers) * int(lengths[numbers].max()) for numbers in batches]
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


class Rows(Positions, Protocol):
    """Which rows belong to which position of which sequence."""

    @property
    def indices(self) -> SequenceOf[int]:
        """Row in the source of each sequence that has some."""

    @property
    def offsets(self) -> np.ndarray | None:
        """Place of each row in its sequence; None: each sequence has all of its positions."""


@dataclass(frozen=True)
class RoutedRows:
    """Rows of a batch that a module sees some of: of each sequence the positions routed to it.

    Attributes:
        indices: Row in the source of each sequence that has any.
        lengths: Rows of each of them.
        real: Which of the captured rows these are [M].
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

    @classmethod
    def of(cls, batch: "Batch", positions: Tensor) -> "RoutedRows":
        """From flat positions b·T + t of a batch, ascending, some of them padding."""
        where = positions.cpu().numpy()
        rows, offsets = np.divmod(where, batch.input_ids.shape[1])
        real = offsets < np.asarray(batch.lengths)[rows]
        owners, lengths = np.unique(rows[real], return_counts=True)
        return cls(
            tuple(batch.indices[owner] for owner in owners),
            tuple(lengths.tolist()),
            torch.from_numpy(np.flatnonzero(real)).to(positions.device),
            offsets[real],
        )


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right to one length.

    Attributes:
        indices: Row in the source of each sequence [B].
        lengths: Positions of each sequence [B].
        input_ids: Token ids [B, T], int64; 0 in padding.
        targets: Token ids to predict [B, T], int64; −100 where there is no label.
        mask: 1 at real positions [B, T], int64; None where there is no padding.
        real: Flat positions b·T + t that are real, ascending [M]; None where all are.
        labelled: Flat positions that carry a label, ascending.
    """

    indices: tuple[int, ...]
    lengths: tuple[int, ...]
    input_ids: Tensor
    targets: Tensor
    mask: Tensor | None
    real: Tensor | None
    labelled: Tensor

    @property
    def num_positions(self) -> int:
        """Counted positions of the batch."""
        return sum(self.lengths)

    @property
    def offsets(self) -> None:
        """Every sequence has all of its positions; see `Rows`."""
        return None

    @property
    def num_labels(self) -> int:
        """Labels of the batch."""
        return self.labelled.numel()

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return Batch(
            self.indices,
            self.lengths,
            self.input_ids.to(device),
            self.targets.to(device),
            move(self.mask),
            move(self.real),
            self.labelled.to(device),
        )


def collate(sequences: SequenceOf[Sequence]) -> Batch:
    """Pads sequences on the right to the longest of them.

    Args:
        sequences: One or more sequences.
    """
    lengths = tuple(len(sequence.inputs) for sequence in sequences)
    longest = max(lengths)
    input_ids = np.zeros((len(sequences), longest), dtype=np.int64)
    targets = np.full((len(sequences), longest), NO_LABEL, dtype=np.int64)
    mask = np.zeros((len(sequences), longest), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        input_ids[row, : lengths[row]] = sequence.inputs
        targets[row, : lengths[row]] = sequence.targets
        mask[row, : lengths[row]] = 1
    padded = not mask.all()
    return Batch(
        indices=tuple(sequence.index for sequence in sequences),
        lengths=lengths,
        input_ids=torch.from_numpy(input_ids),
        targets=torch.from_numpy(targets),
        mask=torch.from_numpy(mask) if padded else None,
        real=torch.from_numpy(np.flatnonzero(mask)) if padded else None,
        labelled=torch.from_numpy(np.flatnonzero(targets != NO_LABEL)),
    )
