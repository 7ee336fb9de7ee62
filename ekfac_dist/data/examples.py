"""Examples of any task, in memory: mappings of arrays, and what passes have to know of them.

What an example is and how a batch is made of some is the task's to say; here is only what is the
same for all: which of them there are, how many positions each has, and by what they are known.
"""

import copy
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ekfac_dist.data.batches import NO_LABEL, Batch, Grid, key_of
from ekfac_dist.data.sequences import Counts, as_array
from ekfac_dist.errors import DataError, first_line

Example = Mapping[str, np.ndarray]


class Examples(Protocol):
    """What passes read: token sequences, or examples of any task.

    Attributes:
        indices: Row in the source of each [N].
        num_positions: Counted positions of each [N].
        counts: What became of the source's rows.
        max_id: The largest token id.
        equal_above: Longer ones share a batch only with others of their length; None: with any.
    """

    indices: np.ndarray
    num_positions: np.ndarray
    equal_above: int | None
    counts: Counts
    max_id: int

    def __len__(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that is read."""

    @property
    def longest(self) -> int:
        """Length of the longest input."""

    def take(self, numbers: ArrayLike) -> Self:
        """Some of these, in the order given; the counts stay those of the source."""

    def batch(self, numbers: Iterable[int]) -> Batch:
        """Some of these, padded to one length or packed."""

    def positions_of(self, module: str) -> np.ndarray:
        """Counted positions of each that a module sees [N]."""


class TaskExamples:
    """Examples of a task.

    Args:
        data: Any iterable of examples or batches (a list, a `datasets.Dataset`, a `DataLoader`):
            mappings of numbers, arrays, tensors or lists; in a batch every field has one dimension
            more, `input_ids` two. Every worker must give the whole data, the same.
        collate: Makes a batch of examples.
        masks: Which positions of a batch are counted, by the beginning of modules' names.
        aligned: Fields that have an entry for each position of `input_ids`, if they are as long.
        id_fields: Fields that hold token ids.

    Attributes:
        As of `Examples`.

    Raises:
        DataError: No example; one that is no mapping of arrays, or of other fields than the first;
            one without a counted position; or one whose `attention_mask` is not 0 or 1, or leaves
            out a labelled token.
    """

    equal_above: int | None = None

    def __init__(
        self,
        data: Iterable[Any],
        collate: Callable[[SequenceOf[Example]], dict[str, Tensor]],
        masks: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
        aligned: Collection[str],
        *,
        id_fields: SequenceOf[str],
    ) -> None:
        self._collate, self._masks = collate, masks
        whole = (row for given in data for row in _rows(given))
        rows = [_without_padding(number, row, aligned) for number, row in enumerate(whole)]
        if not rows:
            raise DataError("The data has no sequences.")
        for number, row in enumerate(rows):
            if set(row) != set(rows[0]):
                raise DataError(
                    f"Example {number} has {', '.join(row)}; the first has {', '.join(rows[0])}. "
                    "Give every example the same fields."
                )
        self._rows = rows
        self._digest = _digest(rows)
        kept = [number for number, row in enumerate(rows) if _has_label(row)]
        if not kept:
            raise DataError(f"None of the {len(rows)} examples has a label.")
        self.counts = Counts(len(rows), len(rows) - len(kept), 0, 0)
        self.indices = np.array(kept, dtype=np.int64)
        self._lengths = self._positions(kept)
        self.num_positions = np.sum(list(self._lengths.values()), 0)
        self.max_id = _largest_id(rows, id_fields)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every example's fields, in order."""
        return self._digest

    @property
    def longest(self) -> int:
        """Length of the longest input."""
        return max(int(lengths.max()) for lengths in self._lengths.values())

    @property
    def first_with_a_gap(self) -> int | None:
        """Number of the first example whose `attention_mask` leaves out a position inside."""
        for number, index in enumerate(self.indices.tolist()):
            mask = self._rows[index].get("attention_mask")
            if mask is not None and mask.ndim == 1 and not mask.all():
                return number
        return None

    def take(self, numbers: ArrayLike) -> "TaskExamples":
        """Some of these examples, in the order given; the counts stay those of the source."""
        taken = copy.copy(self)
        picked = np.asarray(numbers, dtype=np.int64)
        taken.indices = self.indices[picked]
        taken.num_positions = self.num_positions[picked]
        taken._lengths = {key: lengths[picked] for key, lengths in self._lengths.items()}
        return taken

    def batch(self, numbers: Iterable[int]) -> Batch:
        """Some of these examples, as the task makes a batch of them."""
        numbers = list(numbers)
        batch = self._batch([int(self.indices[number]) for number in numbers])
        for key, grid in batch.grids.items():
            expected = self._lengths[key][numbers].tolist()
            if list(grid.lengths) != expected:
                raise DataError(
                    f"Examples {batch.indices[0]} to {batch.indices[-1]} have {grid.lengths} "
                    f"counted positions in a batch, but {expected} alone; the task's collate and "
                    "masks must count the same however examples are batched."
                )
        return batch

    def positions_of(self, module: str) -> np.ndarray:
        """Counted positions of each example that a module sees [N]."""
        return self._lengths[key_of(self._lengths, module)]

    def _batch(self, indices: SequenceOf[int]) -> Batch:
        inputs = self._collate([self._rows[index] for index in indices])
        grids: dict[str, Grid] = {}
        before = np.zeros(len(indices), dtype=np.int64)
        for key, mask in self._masks(inputs).items():
            if mask.ndim != 2 or mask.shape[0] != len(indices):
                raise DataError(
                    f"The task's mask is of shape {list(mask.shape)} for {len(indices)} examples; "
                    f"it must be [{len(indices)}, positions]."
                )
            grids[key] = Grid.of(indices, mask.numpy(), before if len(grids) else None)
            before = before + grids[key].lengths
        return Batch.of(indices, inputs, grids)

    def _positions(self, indices: SequenceOf[int]) -> dict[str, np.ndarray]:
        """Counted positions of each example alone, by the beginning of modules' names."""
        lengths: dict[str, list[int]] = {}
        for index in indices:
            for key, grid in self._batch([index]).grids.items():
                if not grid.num_positions:
                    what = f"for the modules of {key}" if key else "for the model"
                    raise DataError(f"Example {index} has no position {what}; leave it out.")
                lengths.setdefault(key, []).append(grid.num_positions)
        return {key: np.array(found, dtype=np.int64) for key, found in lengths.items()}


def _rows(given: Any) -> Iterator[dict[str, np.ndarray]]:
    """The examples of an example, or of a batch: a batch's `input_ids` have two dimensions."""
    if not isinstance(given, Mapping) or not given:
        raise DataError(
            f"The data holds a {type(given).__name__}; give mappings of a task's fields, such as "
            "'input_ids' and 'labels'."
        )
    fields = {str(name): _array(str(name), value) for name, value in given.items()}
    if fields.get("input_ids", np.zeros(0)).ndim < 2:
        yield fields
        return
    counts = {name: array.shape[0] if array.ndim else None for name, array in fields.items()}
    if len(set(counts.values())) > 1:
        raise DataError(
            f"A batch has fields of different first sizes, {counts}; each must have an entry for "
            "each of its sequences."
        )
    for number in range(len(fields["input_ids"])):
        yield {name: array[number] for name, array in fields.items()}


def _array(name: str, value: Any) -> np.ndarray:
    if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
        value = value.float()  # which arrays do not know
    try:
        array = np.asarray(as_array(value))
    except ValueError as error:
        raise DataError(
            f"{name} has rows of different lengths ({first_line(error)}); give examples one by "
            "one, or pad them and give an attention_mask."
        ) from error
    if array.dtype.kind in "iub":
        return array.astype(np.int64)
    if array.dtype.kind == "f":
        return array
    raise DataError(
        f"An example's {name} is {type(value).__name__}, no array of numbers; leave the field out, "
        "or give one."
    )


def _without_padding(
    number: int, row: dict[str, np.ndarray], aligned: Collection[str]
) -> dict[str, np.ndarray]:
    """An example without what its `attention_mask` leaves out at either end.

    What it leaves out inside stays in place: the model sees the mask, and its positions as they
    are. Such a position is not counted, so it may have no label.
    """
    mask = row.get("attention_mask")
    if mask is None or mask.ndim != 1:
        return row
    wrong = mask[(mask != 0) & (mask != 1)]
    if wrong.size:
        raise DataError(
            f"Example {number} has {wrong[0]} in its attention_mask; it must be 1 at real tokens "
            "and 0 at others."
        )
    if not mask.any():
        return row
    real = np.flatnonzero(mask)
    others = [name for name in row if name not in aligned and not _is_of_decoder(name)]
    if real[0] and others:
        raise DataError(
            f"An example is padded on the left, and its {others[0]} may count positions; pad on "
            "the right, or give the examples without padding."
        )
    kept = slice(real[0], real[-1] + 1)
    labels = row.get("labels")
    if "labels" in aligned and labels is not None and labels.shape == mask.shape:
        unread = (mask == 0) & (labels != NO_LABEL)
        if unread[kept].any():
            raise DataError(
                f"Example {number} has a label at position {kept.start + unread[kept].argmax()}, "
                f"where its attention_mask is 0; give {NO_LABEL} there, or a mask of 1."
            )
    return {
        name: array[kept] if array.ndim and len(array) == len(mask) and name in aligned else array
        for name, array in row.items()
    }


def _has_label(row: Example) -> bool:
    """Whether there is anything to predict; an example without such labels is taken at its word."""
    labels = row.get("labels")
    return labels is None or labels.dtype.kind == "f" or bool(np.any(labels != NO_LABEL))


def _largest_id(rows: Iterable[Example], fields: Iterable[str]) -> int:
    """The largest token id; one below 0 is refused."""
    largest, fields = 0, list(fields)
    for number, row in enumerate(rows):
        for name in fields:
            ids = row.get(name, np.zeros(0))
            ids = ids[ids != NO_LABEL] if name == "labels" else ids
            if np.min(ids, initial=0) < 0:
                raise DataError(
                    f"Example {number} has {int(np.min(ids))} in {name}; token ids are 0 or more."
                )
            largest = max(largest, int(np.max(ids, initial=0)))
    return largest


def _is_of_decoder(name: str) -> bool:
    return name == "labels" or name.startswith("decoder_")


def _digest(rows: Iterable[Example]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for name in sorted(row):
            array = np.ascontiguousarray(row[name])
            digest.update(f"{name}|{array.dtype}|{array.shape}|".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()
