"""Examples of any task, in memory: mappings of arrays, with what a pass has to know of them.

The task says what an example is and how examples make a batch. Here is what all tasks have in
common: the examples' indices, their numbers of counted positions, and their fingerprint. Knows no
model.
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
from ekfac_dist.data.sequences import Counts
from ekfac_dist.data.tokenized_examples import as_array
from ekfac_dist.errors import DataError, first_line

Example = Mapping[str, np.ndarray]


class Examples(Protocol):
    """What a pass reads: token sequences, or examples of any task.

    Attributes:
        indices: Index in the source of each example [N], ascending unless `take` reordered them.
        num_positions: Counted positions of each example [N].
        equal_above: Examples longer than this share a batch only with others of their length;
            None: examples of any lengths may share one.
        counts: How many of the source's examples were kept, left out or cut.
        max_id: The largest token id.
    """

    indices: np.ndarray
    num_positions: np.ndarray
    equal_above: int | None
    counts: Counts
    max_id: int

    def __len__(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all examples of the source, those without labels included."""

    @property
    def longest(self) -> int:
        """Positions of the longest example."""

    def take(self, selection: ArrayLike) -> Self:
        """The selected examples, in the given order; `counts` stay those of the source.

        Args:
            selection: Indices into this collection, not into the source [n].
        """

    def batch(self, selection: Iterable[int]) -> Batch:
        """One batch of the selected examples, padded to one length or packed.

        Args:
            selection: Indices into this collection, not into the source [B].
        """

    def positions_of(self, module: str) -> np.ndarray:
        """Counted positions of each example that a module sees [N]."""


class TaskExamples:
    """Examples of a task, without those that have no label.

    Args:
        data: Iterable of examples or batches (a list, a `datasets.Dataset`, a `DataLoader`):
            mappings of field names to numbers, arrays, tensors or lists. In a batch, which is
            recognised by two-dimensional `input_ids`, every field has a leading dimension more.
            Every worker must pass the whole data, in the same order.
        collate: Makes a batch's tensors from a list of examples.
        masks: From a batch's tensors, the mask [B, T] of counted positions for each prefix of
            modules' names.
        aligned: Fields with one entry per position of `input_ids`, where they are as long.
        id_fields: Fields that hold token ids.

    Attributes:
        As of `Examples`.

    Raises:
        DataError: If there is no example; if an example is no mapping of arrays, has other fields
            than the first one or no counted position; or if its `attention_mask` holds other values
            than 0 and 1, or is 0 at a labelled token.
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
        raw_examples = (example for item in data for example in _split_batch(item))
        examples = [
            _without_padding(index, example, aligned) for index, example in enumerate(raw_examples)
        ]
        if not examples:
            raise DataError("The data has no sequences.")
        for index, example in enumerate(examples):
            if set(example) != set(examples[0]):
                raise DataError(
                    f"Example {index} has {', '.join(example)}; the first has "
                    f"{', '.join(examples[0])}. Give every example the same fields."
                )
        self._examples = examples
        self._digest = _hash_examples(examples)
        labelled = [index for index, example in enumerate(examples) if _has_label(example)]
        if not labelled:
            raise DataError(f"None of the {len(examples)} examples has a label.")
        self.counts = Counts(len(examples), len(examples) - len(labelled), 0, 0)
        self.indices = np.array(labelled, dtype=np.int64)
        self._lengths = self._count_positions(labelled)
        self.num_positions = np.sum(list(self._lengths.values()), 0)
        self.max_id = _largest_id(examples, id_fields)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of every example's fields, in order."""
        return self._digest

    @property
    def longest(self) -> int:
        """Counted positions of the longest example, of its encoder's or decoder's."""
        return max(int(lengths.max()) for lengths in self._lengths.values())

    @property
    def first_with_a_gap(self) -> int | None:
        """The first example whose `attention_mask` is 0 between two positions where it is 1.

        An index into this collection; None if there is no such example.
        """
        for k, index in enumerate(self.indices.tolist()):
            mask = self._examples[index].get("attention_mask")
            if mask is not None and mask.ndim == 1 and not mask.all():
                return k
        return None

    def take(self, selection: ArrayLike) -> "TaskExamples":
        """The selected examples, in the given order; `counts` stay those of the source.

        Args:
            selection: Indices into this collection, not into the source [n].
        """
        taken = copy.copy(self)
        selected = np.asarray(selection, dtype=np.int64)
        taken.indices = self.indices[selected]
        taken.num_positions = self.num_positions[selected]
        taken._lengths = {key: lengths[selected] for key, lengths in self._lengths.items()}
        return taken

    def batch(self, selection: Iterable[int]) -> Batch:
        """One batch of the selected examples, made by the task's `collate`.

        Args:
            selection: Indices into this collection, not into the source [B].

        Raises:
            DataError: If an example has another number of counted positions than alone.
        """
        selection = list(selection)
        batch = self._make_batch([int(self.indices[k]) for k in selection])
        for key, grid in batch.grids.items():
            expected = self._lengths[key][selection].tolist()
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

    def _make_batch(self, indices: SequenceOf[int]) -> Batch:
        """A batch of examples, given their indices in the source."""
        inputs = self._collate([self._examples[index] for index in indices])
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

    def _count_positions(self, indices: SequenceOf[int]) -> dict[str, np.ndarray]:
        """Counted positions of each example [N], by prefix of modules' names."""
        lengths: dict[str, list[int]] = {}
        for index in indices:
            for key, grid in self._make_batch([index]).grids.items():
                if not grid.num_positions:
                    subject = f"for the modules of {key}" if key else "for the model"
                    raise DataError(f"Example {index} has no position {subject}; leave it out.")
                lengths.setdefault(key, []).append(grid.num_positions)
        return {key: np.array(counts, dtype=np.int64) for key, counts in lengths.items()}


def _split_batch(item: Any) -> Iterator[dict[str, np.ndarray]]:
    """The example itself; or, of a batch (two-dimensional `input_ids`), its examples."""
    if not isinstance(item, Mapping) or not item:
        raise DataError(
            f"The data holds a {type(item).__name__}; give mappings of a task's fields, such as "
            "'input_ids' and 'labels'."
        )
    fields = {str(name): _as_numbers(str(name), value) for name, value in item.items()}
    if fields.get("input_ids", np.zeros(0)).ndim < 2:
        yield fields
        return
    counts = {name: array.shape[0] if array.ndim else None for name, array in fields.items()}
    if len(set(counts.values())) > 1:
        raise DataError(
            f"A batch has fields of different first sizes, {counts}; each must have an entry for "
            "each of its sequences."
        )
    for k in range(len(fields["input_ids"])):
        yield {name: array[k] for name, array in fields.items()}


def _as_numbers(name: str, value: Any) -> np.ndarray:
    """A field's value as an array of int64 or of floats."""
    if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
        value = value.float()  # a dtype that NumPy does not have
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
    index: int, example: dict[str, np.ndarray], aligned: Collection[str]
) -> dict[str, np.ndarray]:
    """An example without the padding at either end, where its `attention_mask` is 0.

    Positions inside whose mask is 0 stay: the model is given the mask. They are not counted, so
    they must not be labelled.
    """
    mask = example.get("attention_mask")
    if mask is None or mask.ndim != 1:
        return example
    invalid = mask[(mask != 0) & (mask != 1)]
    if invalid.size:
        raise DataError(
            f"Example {index} has {invalid[0]} in its attention_mask; it must be 1 at real tokens "
            "and 0 at others."
        )
    if not mask.any():
        return example
    real_positions = np.flatnonzero(mask)
    unaligned = [name for name in example if name not in aligned and not _belongs_to_decoder(name)]
    if real_positions[0] and unaligned:
        raise DataError(
            f"An example is padded on the left, and its {unaligned[0]} may count positions; pad on "
            "the right, or give the examples without padding."
        )
    unpadded = slice(real_positions[0], real_positions[-1] + 1)
    labels = example.get("labels")
    if "labels" in aligned and labels is not None and labels.shape == mask.shape:
        masked_labels = (mask == 0) & (labels != NO_LABEL)
        if masked_labels[unpadded].any():
            position = unpadded.start + masked_labels[unpadded].argmax()
            raise DataError(
                f"Example {index} has a label at position {position}, "
                f"where its attention_mask is 0; give {NO_LABEL} there, or a mask of 1."
            )
    return {
        name: array[unpadded]
        if array.ndim and len(array) == len(mask) and name in aligned
        else array
        for name, array in example.items()
    }


def _has_label(example: Example) -> bool:
    """Whether an example is labelled; float labels, or no field `labels`, count as labelled."""
    labels = example.get("labels")
    return labels is None or labels.dtype.kind == "f" or bool(np.any(labels != NO_LABEL))


def _largest_id(examples: Iterable[Example], fields: Iterable[str]) -> int:
    """The largest token id of all examples.

    Raises:
        DataError: If an id is below 0.
    """
    largest, fields = 0, list(fields)
    for index, example in enumerate(examples):
        for name in fields:
            ids = example.get(name, np.zeros(0))
            ids = ids[ids != NO_LABEL] if name == "labels" else ids
            if np.min(ids, initial=0) < 0:
                raise DataError(
                    f"Example {index} has {int(np.min(ids))} in {name}; token ids are 0 or more."
                )
            largest = max(largest, int(np.max(ids, initial=0)))
    return largest


def _belongs_to_decoder(name: str) -> bool:
    """Whether a field has one entry per position of the decoder."""
    return name == "labels" or name.startswith("decoder_")


def _hash_examples(examples: Iterable[Example]) -> str:
    """SHA-256 of every example's fields, in order."""
    digest = hashlib.sha256()
    for example in examples:
        for name in sorted(example):
            array = np.ascontiguousarray(example[name])
            digest.update(f"{name}|{array.dtype}|{array.shape}|".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()
