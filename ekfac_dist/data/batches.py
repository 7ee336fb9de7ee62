"""A batch of sequences: its tensors, its counted positions and its labels.

Knows no model and no task: only masks, lengths and labels.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

NO_LABEL = -100  # the label where there is none, as in `transformers`


class Positions(Protocol):
    """Captured positions of a batch, grouped by sequence: all that running sums need."""

    @property
    def lengths(self) -> SequenceOf[int]:
        """Captured positions of each sequence, in order [B]."""

    @property
    def num_positions(self) -> int:
        """Captured positions of all sequences."""

    @property
    def are_copies(self) -> bool:
        """Whether captured tensors are copies; else they share memory with the model's."""

    @property
    def sender(self) -> int:
        """The worker that captured them, by its place among those that exchange rows."""


class CapturedPositions(Positions, Protocol):
    """Captured positions that also know where in their sequence they are."""

    @property
    def indices(self) -> SequenceOf[int]:
        """Index in the source of each sequence that has captured positions."""

    @property
    def offsets(self) -> np.ndarray | None:
        """Offset in its sequence of each position [M]; None: every sequence is complete."""


@dataclass(frozen=True)
class Grid:
    """A batch's B sequences × T positions, padding included, and which of them are counted.

    Attributes:
        indices: Index in the source of each sequence [B].
        lengths: Counted positions of each sequence [B].
        shape: (B, T).
        real: Flat indices b·T + t of the counted positions, ascending [M]; None: all are counted.
        offsets: Offset of each counted position among all of its sequence's [M]; None where the
            counted positions are the whole sequence, in order.
        real_on_host: `real` on the host, so that the device need not be asked.
    """

    indices: tuple[int, ...]
    lengths: tuple[int, ...]
    shape: tuple[int, int]
    real: Tensor | None
    offsets: np.ndarray | None = None
    real_on_host: np.ndarray | None = None
    sender = 0

    @classmethod
    def of(
        cls, indices: SequenceOf[int], mask: np.ndarray, before: np.ndarray | None = None
    ) -> "Grid":
        """From a mask [B, T] that is true, or 1, at counted positions.

        Args:
            indices: Index in the source of each sequence [B].
            mask: The mask.
            before: Positions of each sequence that precede those of this grid [B]: an
                encoder-decoder's encoder positions precede the decoder's. None: there are none.
        """
        mask = mask.astype(bool)
        lengths = tuple(mask.sum(1).tolist())
        real = None if mask.all() else torch.from_numpy(np.flatnonzero(mask))
        offsets = None
        if before is not None:
            starts = zip(before.tolist(), lengths, strict=True)
            offsets = np.concatenate([np.arange(start, start + n) for start, n in starts])
        shape = mask.shape[0], mask.shape[1]
        on_host = None if real is None else real.numpy()
        return cls(tuple(indices), lengths, shape, real, offsets, on_host)

    @property
    def are_copies(self) -> bool:
        """Whether captured tensors are copies: where some positions are left out."""
        return self.real is not None

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

    def routed(
        self,
        flat: np.ndarray,
        device: torch.device,
        sizes: np.ndarray | None = None,
        tracked: SequenceOf[int] = (0,),
    ) -> "RoutedParts":
        """The counted ones among positions that were routed to experts.

        Args:
            flat: Flat indices b·T + t, int64 [n], in the order of the experts' inputs.
            device: Where those are.
            sizes: How many of the positions are each expert's, in order; None: there is one expert.
            tracked: Which experts matter, ascending.
        """
        sizes = np.array([len(flat)]) if sizes is None else sizes
        experts = np.repeat(np.arange(len(sizes)), sizes)
        counted = slice(None) if self.real_on_host is None else self.real_on_host
        is_counted, is_tracked = np.zeros(self.size, dtype=bool), np.zeros(len(sizes), dtype=bool)
        is_counted[counted] = is_tracked[list(tracked)] = True
        order = np.argsort(experts * self.size + flat, kind="stable")
        rows = order[is_counted[flat[order]] & is_tracked[experts[order]]]
        is_whole = len(rows) == len(flat) and bool((rows[:-1] < rows[1:]).all())
        # The index of each among all counted positions, and its sequence.
        counted_before = np.zeros(self.size, dtype=np.int64)
        counted_before[counted] = np.arange(self.num_positions)
        indices, experts = counted_before[flat[rows]], experts[rows]
        starts = np.concatenate([[0], np.cumsum(self.lengths)])
        sequences = np.searchsorted(starts, indices, side="right") - 1
        offsets = indices - starts[sequences] if self.offsets is None else self.offsets[indices]
        # Where an expert's part of a sequence begins.
        begins = np.flatnonzero(np.diff(experts * len(starts) + sequences, prepend=-1))
        lengths = np.diff(begins, append=len(rows)).tolist()
        parts = np.searchsorted(experts[begins], np.arange(len(sizes) + 1)).tolist()
        first_rows = np.cumsum(sizes) - sizes
        real = local = None
        if not is_whole:
            both = torch.from_numpy(np.stack([rows, rows - first_rows[experts]]))
            real, local = to_device(both, device)
        of_expert, start = {}, 0
        names = [self.indices[sequence] for sequence in sequences[begins].tolist()]
        for expert, (first, last) in enumerate(pairwise(parts)):
            if first == last:
                continue
            own = slice(start, start + sum(lengths[first:last]))
            of_expert[expert] = RoutedPositions(
                tuple(names[first:last]),
                tuple(lengths[first:last]),
                None if local is None else local[own],
                offsets[own],
            )
            start = own.stop
        return RoutedParts(real, of_expert)


@dataclass(frozen=True)
class RoutedPositions:
    """Counted positions that were routed to one expert, sequence by sequence.

    Attributes:
        indices: Index in the source of each sequence that has any.
        lengths: Routed positions of each of these sequences.
        real: Indices of these positions in the expert's input [M]; None: they are all of it, in
            order.
        offsets: Offset of each in its sequence [M].
    """

    indices: tuple[int, ...]
    lengths: tuple[int, ...]
    real: Tensor | None
    offsets: np.ndarray
    sender = 0

    @property
    def are_copies(self) -> bool:
        """Whether captured tensors are copies: where some are left out, or in another order."""
        return self.real is not None

    @property
    def num_positions(self) -> int:
        """Routed positions of all sequences."""
        return len(self.offsets)


NO_POSITIONS = RoutedPositions((), (), None, np.empty(0, dtype=np.int64))


@dataclass(frozen=True)
class RoutedParts:
    """Counted positions that were routed to several experts, expert by expert.

    Attributes:
        real: Indices of these positions in the input of all experts [M]; None: they are all of it,
            in order.
        of_expert: The part of each expert that has any, in order.
    """

    real: Tensor | None
    of_expert: Mapping[int, RoutedPositions]


@dataclass(frozen=True)
class LabelPlaces:
    """Where a batch's labels are; known on the host, so the device need not be asked.

    Attributes:
        flat: Flat indices into `inputs["labels"]` of the labels that are not −100, ascending [L].
        sequences: Which of the batch's sequences each belongs to, 0 to B − 1 [L].
        offsets: Offset of each in that sequence [L].
        smallest: The smallest label.
        largest: The largest label.
        flat_on_device: `flat` on the batch's device.
        sequences_on_device: `sequences` on the batch's device.
    """

    flat: np.ndarray
    sequences: np.ndarray
    offsets: np.ndarray
    smallest: int
    largest: int
    flat_on_device: Tensor
    sequences_on_device: Tensor

    @classmethod
    def of(cls, labels: Tensor, spans: SequenceOf[int]) -> "LabelPlaces":
        """Finds the labels of a batch.

        Args:
            labels: Labels in any shape, int64; −100 where there is none.
            spans: How many elements of `labels` each sequence takes up, in order [B].
        """
        values = labels.detach().cpu().numpy().reshape(-1)
        flat = np.flatnonzero(values != NO_LABEL)
        ends = np.cumsum(spans)
        sequences = np.searchsorted(ends, flat, side="right")
        present = values[flat] if flat.size else np.zeros(1, np.int64)
        on_host = cls(
            flat,
            sequences,
            flat - (ends - np.asarray(spans))[sequences],
            int(present.min()),
            int(present.max()),
            torch.from_numpy(flat),
            torch.from_numpy(sequences),
        )
        return on_host.to(labels.device)

    def to(self, device: torch.device) -> "LabelPlaces":
        """The same labels for a batch on another device."""
        return replace(
            self,
            flat_on_device=to_device(self.flat_on_device, device),
            sequences_on_device=to_device(self.sequences_on_device, device),
        )


@dataclass(frozen=True)
class Batch:
    """Padded or packed sequences: the inputs of a task's forward, and the counted positions.

    A packed batch has no padding. Its sequences are concatenated, so every tensor is [1, M], and
    `position_ids` begin at 0 for each sequence.

    Attributes:
        indices: Index in the source of each sequence [B].
        inputs: Tensors by name, [B, ...] each; [1, M] in a packed batch.
        grids: Positions that modules see, by prefix of the modules' names; "" for all others.
        labelled: Where the labels are; None: not known.
        packed: Lengths of the sequences of a packed batch [B]; None for a padded batch.
    """

    indices: tuple[int, ...]
    inputs: Mapping[str, Tensor]
    grids: Mapping[str, Grid]
    labelled: LabelPlaces | None = None
    packed: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls,
        indices: SequenceOf[int],
        inputs: Mapping[str, Tensor],
        grids: Mapping[str, Grid],
        packed: SequenceOf[int] | None = None,
    ) -> "Batch":
        """From tensors on the CPU; the places of integer labels are found here."""
        labels, labelled = inputs.get("labels"), None
        if labels is not None and not labels.is_floating_point():
            widths = [labels.numel() // len(indices)] * len(indices)
            labelled = LabelPlaces.of(labels, widths if packed is None else packed)
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
    """A tensor on another device; to a GPU asynchronously, through pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def key_of(keys: Iterable[str], module: str) -> str:
    """The longest key that is a module's name or a prefix of it; "" is a prefix of all."""
    return max((key for key in keys if not key or f"{module}.".startswith(f"{key}.")), key=len)
