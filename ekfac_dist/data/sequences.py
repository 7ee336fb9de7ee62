"""Token sequences with labels: what every pass reads.

A sequence of tokens x_0 … x_{T-1} becomes inputs x_0 … x_{L-1} and targets x_1 … x_L, where x_L is
its last labelled token. So every kept position is a counted one: a later loss term depends on it.
A target is −100 where its token carries no label (a prompt's). A sequence without any label is left
out and counted. `index` is always the row in the source, whatever was left out before it.
"""

import copy
import hashlib
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import ArrayLike

from ekfac_dist.data.batches import NO_LABEL, Batch, Grid
from ekfac_dist.errors import DataError


@dataclass(frozen=True)
class Sequence:
    """One sequence, ready for a batch.

    Attributes:
        index: Row in the source.
        inputs: Token ids [L], int32 or int64.
        targets: Token ids [L] to predict at each position, −100 where there is no label.
    """

    index: int
    inputs: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Counts:
    """What became of the source's rows.

    Attributes:
        rows: Rows in the source.
        unlabelled: Rows left out because no token of theirs carries a label.
        truncated: Sequences cut to the token limit.
        tokens_cut: Tokens that the cut took away.
        split: Rows with a token that begins in the prompt and ends behind it: it has no label.
        first_split: The first of those rows; None: there is none.
    """

    rows: int
    unlabelled: int
    truncated: int
    tokens_cut: int
    split: int = 0
    first_split: int | None = None

    @property
    def split_note(self) -> str | None:
        """What there is to tell of tokens that prompts' ends split; None: nothing."""
        if not self.split:
            return None
        return (
            f"in {self.split} of {self.rows} rows, first in row {self.first_split} (from 0), a "
            "token begins in the prompt and ends behind it, so it carries no label; where a prompt "
            "ends in a space, end it without the space and begin the text with it"
        )


class Sequences:
    """All sequences of a data set that have a label, readable by number, memory-mapped.

    Args:
        rows: Columns `input_ids` and `labels` (one entry per token, −100 for none) and
            `tokens_cut` (int); and perhaps `split_token`, as `encode` gives it.

    Attributes:
        indices: Row in the source of each kept sequence [N].
        num_positions: Counted positions of each kept sequence [N].
        num_labels: Labels of each kept sequence [N].
        counts: What became of the source's rows.
        max_tokens: Length of the longest row.
        max_id: The largest token id, of labels too.
        packed: Whether sequences of unequal lengths are packed into one row, instead of padded.
        equal_above: Sequences longer than this share a batch only with others of their length.

    Raises:
        DataError: No sequence is left.
    """

    packed = False
    equal_above: int | None = None

    def __init__(self, rows: Dataset) -> None:
        positions = np.zeros(len(rows), dtype=np.int64)
        num_labels = np.zeros(len(rows), dtype=np.int64)
        digest = hashlib.sha256()
        self.max_id = self.max_tokens = 0
        view = rows.with_format("numpy", columns=["input_ids", "labels"])
        for start in range(0, len(rows), 1024):
            part = view[start : start + 1024]
            for offset, (ids, labels) in enumerate(
                zip(part["input_ids"], part["labels"], strict=True)
            ):
                self.max_tokens = max(self.max_tokens, len(ids))
                largest = max(np.max(ids, initial=0), np.max(labels[1:], initial=0))
                self.max_id = max(self.max_id, int(largest))
                labelled = np.flatnonzero(np.asarray(labels)[1:] != NO_LABEL)
                if labelled.size:
                    positions[start + offset] = labelled[-1] + 1
                    num_labels[start + offset] = labelled.size
                for array in (ids, labels):
                    digest.update(np.asarray(array, dtype="<i8").tobytes())
                    digest.update(b"|")
        kept = np.flatnonzero(positions)
        cut = np.asarray(rows["tokens_cut"], dtype=np.int64)
        split = np.zeros(0, dtype=np.int64)
        if "split_token" in rows.column_names:
            texts = rows.with_format("arrow", columns=["split_token"])[:]["split_token"]
            split = np.flatnonzero(texts.is_valid().to_numpy())
        self.counts = Counts(
            rows=len(rows),
            unlabelled=int(len(rows) - kept.size),
            truncated=int((cut > 0).sum()),
            tokens_cut=int(cut.sum()),
            split=int(split.size),
            first_split=int(split[0]) if split.size else None,
        )
        if not kept.size:
            raise DataError(
                f"None of the {len(rows)} sequences has a label: each is empty, of one token, or "
                "all prompt."
            )
        self._rows = view
        self._digest = digest.hexdigest()
        self.indices = kept
        self.num_positions = positions[kept]
        self.num_labels = num_labels[kept]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> Sequence:
        index = int(self.indices[number])
        length = int(self.num_positions[number])
        row = self._rows[index]
        labels = np.asarray(row["labels"])[1 : length + 1]
        return Sequence(index, np.asarray(row["input_ids"])[:length], labels)

    def take(self, numbers: ArrayLike) -> "Sequences":
        """Some of these sequences, in the order given; the counts stay those of the source."""
        taken = copy.copy(self)
        picked = np.asarray(numbers, dtype=np.int64)
        taken.indices = self.indices[picked]
        taken.num_positions = self.num_positions[picked]
        taken.num_labels = self.num_labels[picked]
        return taken

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every row's token ids and labels, in order."""
        return self._digest

    def packing(self) -> "Sequences":
        """The same sequences, whose batches have no padding."""
        packing = copy.copy(self)
        packing.packed = True
        return packing

    def batched_equal_above(self, length: int | None) -> "Sequences":
        """The same sequences, with another `equal_above`."""
        batched = copy.copy(self)
        batched.equal_above = length
        return batched

    def batch(self, numbers: Iterable[int]) -> Batch:
        """Some of these sequences, packed or padded on the right to the longest of them."""
        sequences = [self[number] for number in numbers]
        if self.packed and len({len(sequence.inputs) for sequence in sequences}) > 1:
            return pack(sequences)
        return collate(sequences)

    @property
    def longest(self) -> int:
        """Length of the longest input."""
        return int(self.num_positions.max())

    def positions_of(self, module: str) -> np.ndarray:
        """Counted positions of each sequence that a module sees [N]: all of them."""
        return self.num_positions


def collate(sequences: SequenceOf[Sequence]) -> Batch:
    """Pads sequences on the right to the longest of them.

    The batch has `input_ids` and `labels`, the token to predict at each position [B, T], int64;
    and, where there is padding, `attention_mask`, 1 at real positions. Padding has token 0.

    Args:
        sequences: One or more sequences.
    """
    longest = max(len(sequence.inputs) for sequence in sequences)
    input_ids = np.zeros((len(sequences), longest), dtype=np.int64)
    labels = np.full((len(sequences), longest), NO_LABEL, dtype=np.int64)
    mask = np.zeros((len(sequences), longest), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        length = len(sequence.inputs)
        input_ids[row, :length] = sequence.inputs
        labels[row, :length] = sequence.targets
        mask[row, :length] = 1
    arrays = {"input_ids": input_ids, "labels": labels}
    if not mask.all():
        arrays["attention_mask"] = mask
    indices = tuple(sequence.index for sequence in sequences)
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Batch.of(indices, inputs, {"": Grid.of(indices, mask)})


def pack(sequences: SequenceOf[Sequence]) -> Batch:
    """Puts sequences into one row, one after the other.

    The batch has `input_ids`, `labels` and `position_ids` [1, M], int64; positions begin at 0 for
    each sequence.

    Args:
        sequences: One or more sequences.
    """
    lengths = [len(sequence.inputs) for sequence in sequences]
    arrays = {
        "input_ids": np.concatenate([sequence.inputs for sequence in sequences]),
        "labels": np.concatenate([sequence.targets for sequence in sequences]),
        "position_ids": np.concatenate([np.arange(length) for length in lengths]),
    }
    inputs = {
        name: torch.from_numpy(array.astype(np.int64)[None]) for name, array in arrays.items()
    }
    indices = tuple(sequence.index for sequence in sequences)
    grid = Grid(indices, tuple(lengths), (1, sum(lengths)), None)
    return Batch.of(indices, inputs, {"": grid}, packed=lengths)


def from_examples(
    data: Any, max_tokens: int | None = None, inputs: Collection[str] = ()
) -> Sequences:
    """Sequences from data that is tokenised already.

    A sequence is tokens and labels alone, and the model counts its positions from 0. What would
    make it another one is refused; `position_ids` 0, 1, 2, … and `token_type_ids` 0 at the real
    positions say nothing, and may be there.

    Args:
        data: A `datasets.Dataset`, or any iterable of examples or batches (a `DataLoader`, a list):
            each a mapping with `input_ids` and, if wanted, `labels` (−100 for none; by default
            every token) and `attention_mask` (0 for padding, on either side). Padding is taken off
            here, whatever ids it has. Every worker must give the whole data, the same.
        max_tokens: Longer sequences are cut to this many tokens.
        inputs: Names of what the model takes; an example that has more of it than a sequence
            keeps is refused, and other fields are passed over.

    Raises:
        DataError: No example; one without `input_ids`, or of inconsistent lengths; something that
            is no token id; an `attention_mask` with zeros inside, or other numbers than 0 and 1; or
            inputs that a sequence does not keep.
    """
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "tokens_cut": []}
    for example in data:
        if not isinstance(example, Mapping) or "input_ids" not in example:
            raise DataError(
                f"The data holds a {type(example).__name__} without 'input_ids'; give mappings "
                "with 'input_ids' and, if wanted, 'attention_mask' and 'labels'."
            )
        first = len(columns["input_ids"])
        _refuse_other_inputs(example, {"inputs_embeds", *inputs}, first)
        ids = _rows(example, "input_ids")
        labels = _rows(example, "labels") if example.get("labels") is not None else ids
        masked = example.get("attention_mask") is not None
        masks = _rows(example, "attention_mask") if masked else [np.ones_like(row) for row in ids]
        if not [len(row) for row in ids] == [len(row) for row in labels] == [len(m) for m in masks]:
            raise DataError(
                "An example's input_ids, labels and attention_mask have different lengths: "
                f"{[len(row) for row in ids]}, {[len(row) for row in labels]} and "
                f"{[len(row) for row in masks]}."
            )
        kept = [_real_part(mask, first + number) for number, mask in enumerate(masks)]
        _refuse_positions_and_types(example, masks, kept, first)
        for row, label, real in zip(ids, labels, kept, strict=True):
            row, label = row[real], label[real]
            if np.min(row, initial=0) < 0 or np.min(label[label != NO_LABEL], initial=0) < 0:
                raise DataError(
                    "An example holds a token id below 0; ids are 0 or more, and a label that is "
                    f"none is {NO_LABEL}."
                )
            limit = len(row) if max_tokens is None else max_tokens
            columns["input_ids"].append(row[:limit])
            columns["labels"].append(label[:limit])
            columns["tokens_cut"].append(max(0, len(row) - limit))
    if not columns["input_ids"]:
        raise DataError("The data has no sequences.")
    return Sequences(Dataset.from_dict(columns))


_TASK = "give a Task of your own, whose batches keep it"


def _real_part(mask: np.ndarray, number: int) -> slice:
    """Where a mask of zeros and ones is 1, which is in one piece."""
    wrong = mask[(mask != 0) & (mask != 1)]
    if wrong.size:
        raise DataError(
            f"Example {number} has {wrong[0]} in its attention_mask; it must be 1 at real tokens "
            "and 0 at padding."
        )
    real = np.flatnonzero(mask)
    if not real.size:
        return slice(0, 0)
    part = slice(int(real[0]), int(real[-1]) + 1)
    if part.stop - part.start != real.size:
        hole = part.start + int(np.argmin(mask[part]))
        raise DataError(
            f"Example {number} has an attention_mask with zeros inside (at position {hole}): the "
            "tokens on both sides would be read as if they were adjacent. Only padding at its ends "
            "may be 0; leave tokens that are not to be read out of the example."
        )
    return part


def _refuse_other_inputs(example: Mapping[str, Any], inputs: Collection[str], number: int) -> None:
    """Refuses inputs of a model that a sequence does not keep; plain switches are none."""
    known = {"input_ids", "labels", "attention_mask", "position_ids", "token_type_ids"}
    for name in sorted(set(map(str, example)) & (set(inputs) - known)):
        if not (example[name] is None or isinstance(example[name], (bool, int, str))):
            raise DataError(
                f"Example {number} has {name}, which the model takes, but a causal language "
                f"model's sequence is input_ids and labels alone; leave it out, or {_TASK}."
            )


def _refuse_positions_and_types(
    example: Mapping[str, Any], masks: list[np.ndarray], kept: list[slice], first: int
) -> None:
    """Refuses `position_ids` and `token_type_ids` that are not what they are by default."""
    for name, default, rule in (
        ("position_ids", np.arange, "positions are counted 0, 1, 2, … from its first real token"),
        ("token_type_ids", np.zeros, "a causal language model's sequence has no token types but 0"),
    ):
        if example.get(name) is None:
            continue
        rows = _rows(example, name)
        if [len(row) for row in rows] != [len(mask) for mask in masks]:
            raise DataError(
                f"Example {first} has {name} of lengths {[len(row) for row in rows]}, but "
                f"input_ids of lengths {[len(mask) for mask in masks]}; leave {name} out."
            )
        for number, (row, real) in enumerate(zip(rows, kept, strict=True), start=first):
            if (row[real] != default(len(row[real]))).any():
                shown = ", ".join(map(str, row[real][:4].tolist()))
                raise DataError(
                    f"Example {number} has {name} of its own ({shown}, …), but {rule}; "
                    f"leave {name} out, or {_TASK}."
                )


def _rows(example: Mapping[str, Any], column: str) -> list[np.ndarray]:
    """One array per sequence, of an example (one dimension) or a batch (two)."""
    value = as_array(example[column])
    if isinstance(value, np.ndarray):
        rows = list(value) if value.ndim == 2 else [value]
    elif isinstance(value, (list, tuple)) and value and np.ndim(value[0]):
        rows = [np.asarray(as_array(row)) for row in value]  # lengths may differ
    else:
        rows = [np.asarray(value)]
    if any(row.ndim != 1 or (row.size and row.dtype.kind not in "iub") for row in rows):
        raise DataError(
            f"An example's {column} is no sequence of whole numbers, nor a batch of them; give a "
            "tensor, an array or a list."
        )
    return [row.astype(np.int64) for row in rows]


def as_array(value: Any) -> Any:
    """A tensor as an array on the CPU; anything else as it is."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value
