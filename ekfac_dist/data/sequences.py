"""Token sequences with labels: what passes of causal language modelling read.

The tokens x_0 … x_{T-1} of an example become inputs x_0 … x_{L-1} and targets x_1 … x_L, where x_L
is its last labelled token. So every position that is left is a counted one: a later loss term
depends on it. A target is −100 where its token carries no label, as a prompt's tokens do not. An
example without any label is left out, and counted as such.

Two kinds of integers select sequences: `index` always means the index in the source, whatever was
left out before it; a `selection` holds indices into the collection at hand.
"""

import copy
import hashlib
from collections.abc import Iterable
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
        index: Index in the source.
        inputs: Token ids [L], int32 or int64.
        targets: The token id to predict at each position [L]; −100 where there is no label.
    """

    index: int
    inputs: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Counts:
    """How many of the source's examples were kept, left out or cut.

    Attributes:
        rows: Examples in the source.
        unlabelled: Examples left out because none of their tokens carries a label.
        truncated: Examples cut to the token limit.
        tokens_cut: Tokens removed by that.
        split: Examples with a token that begins in the prompt and ends after it; it has no label.
        first_split: Index of the first of these; None if there is none.
        documents: Rows of the source that the examples are parts of; None: each is one row.
    """

    rows: int
    unlabelled: int
    truncated: int
    tokens_cut: int
    split: int = 0
    first_split: int | None = None
    documents: int | None = None

    @property
    def split_note(self) -> str | None:
        """A warning about tokens that a prompt's end splits; None if there are none."""
        if not self.split:
            return None
        return (
            f"in {self.split} of {self.rows} rows, first in row {self.first_split} (from 0), a "
            "token begins in the prompt and ends behind it, so it carries no label; where a prompt "
            "ends in a space, end it without the space and begin the text with it"
        )


class Sequences:
    """All sequences of a data set that have a label, memory-mapped.

    `sequences[k]` is the k-th of those that were kept.

    Args:
        examples: Tokenised examples, with columns `input_ids` and `labels` (one entry per token,
            −100 for none) and `tokens_cut` (int); optionally `split_token`, as from `encode`, and
            `document` and `first_token`, as from `windows.in_parts`.

    Attributes:
        indices: Index in the source of each sequence [N].
        num_positions: Counted positions of each sequence [N].
        num_labels: Labels of each sequence [N].
        origins: (document, first token) in the source of each sequence [N, 2]; None where every
            document is one sequence, so that a sequence's index is its document's.
        counts: How many of the source's examples were kept, left out or cut.
        max_tokens: Tokens of the longest example in the source.
        max_id: The largest token id, labels included.
        packed: Whether sequences of unequal lengths are packed instead of padded.
        equal_above: Sequences longer than this share a batch only with others of their length;
            None: sequences of any lengths may share one.

    Raises:
        DataError: If no sequence has a label.
    """

    packed = False
    equal_above: int | None = None

    def __init__(self, examples: Dataset) -> None:
        positions = np.zeros(len(examples), dtype=np.int64)
        num_labels = np.zeros(len(examples), dtype=np.int64)
        digest = hashlib.sha256()
        self.max_id = self.max_tokens = 0
        view = examples.with_format("numpy", columns=["input_ids", "labels"])
        for start in range(0, len(examples), 1024):
            chunk = view[start : start + 1024]
            for offset, (ids, labels) in enumerate(
                zip(chunk["input_ids"], chunk["labels"], strict=True)
            ):
                self.max_tokens = max(self.max_tokens, len(ids))
                largest = max(np.max(ids, initial=0), np.max(labels[1:], initial=0))
                self.max_id = max(self.max_id, int(largest))
                label_offsets = np.flatnonzero(np.asarray(labels)[1:] != NO_LABEL)
                if label_offsets.size:
                    positions[start + offset] = label_offsets[-1] + 1
                    num_labels[start + offset] = label_offsets.size
                _add_example(digest, ids, labels)
        labelled_indices = np.flatnonzero(positions)
        tokens_cut = np.asarray(examples["tokens_cut"], dtype=np.int64)
        split_indices = np.zeros(0, dtype=np.int64)
        if "split_token" in examples.column_names:
            split_tokens = examples.with_format("arrow", columns=["split_token"])[:]["split_token"]
            split_indices = np.flatnonzero(split_tokens.is_valid().to_numpy())
        origins = _origins(examples)
        self.counts = Counts(
            rows=len(examples),
            unlabelled=int(len(examples) - labelled_indices.size),
            truncated=int((tokens_cut > 0).sum()),
            tokens_cut=int(tokens_cut.sum()),
            split=int(split_indices.size),
            first_split=int(split_indices[0]) if split_indices.size else None,
            documents=None if origins is None else len(np.unique(origins[:, 0])),
        )
        if not labelled_indices.size:
            raise DataError(
                f"None of the {len(examples)} sequences has a label: each is empty, of one token, "
                "or all prompt."
            )
        self.origins = None if origins is None else origins[labelled_indices]
        self._examples = view
        self._digest = digest.hexdigest()
        self.indices = labelled_indices
        self.num_positions = positions[labelled_indices]
        self.num_labels = num_labels[labelled_indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, k: int) -> Sequence:
        index = int(self.indices[k])
        length = int(self.num_positions[k])
        example = self._examples[index]
        labels = np.asarray(example["labels"])[1 : length + 1]
        return Sequence(index, np.asarray(example["input_ids"])[:length], labels)

    def take(self, selection: ArrayLike) -> "Sequences":
        """The selected sequences, in the given order; `counts` stay those of the source.

        Args:
            selection: Indices into this collection, not into the source [n].
        """
        taken = copy.copy(self)
        selected = np.asarray(selection, dtype=np.int64)
        taken.indices = self.indices[selected]
        taken.num_positions = self.num_positions[selected]
        taken.num_labels = self.num_labels[selected]
        taken.origins = None if self.origins is None else self.origins[selected]
        return taken

    @property
    def fingerprint(self) -> str:
        """SHA-256 of every example's token ids and labels, in order."""
        return self._digest

    def fingerprint_of_first(self, rows: int) -> str:
        """The fingerprint that the first so many examples of the source have alone."""
        digest = hashlib.sha256()
        for start in range(0, rows, 1024):
            chunk = self._examples[start : min(start + 1024, rows)]
            for ids, labels in zip(chunk["input_ids"], chunk["labels"], strict=True):
                _add_example(digest, ids, labels)
        return digest.hexdigest()

    def packing(self) -> "Sequences":
        """The same sequences, batched without padding."""
        packed = copy.copy(self)
        packed.packed = True
        return packed

    def batched_equal_above(self, length: int | None) -> "Sequences":
        """The same sequences with another `equal_above`."""
        sequences = copy.copy(self)
        sequences.equal_above = length
        return sequences

    def batch(self, selection: Iterable[int]) -> Batch:
        """One batch of the selected sequences: packed, or padded on the right to the longest.

        Args:
            selection: Indices into this collection, not into the source [B].
        """
        sequences = [self[k] for k in selection]
        if self.packed and len({len(sequence.inputs) for sequence in sequences}) > 1:
            return pack(sequences)
        return collate(sequences)

    @property
    def longest(self) -> int:
        """Positions of the longest sequence."""
        return int(self.num_positions.max())

    def positions_of(self, module: str) -> np.ndarray:
        """Counted positions of each sequence that a module sees: all of them [N]."""
        return self.num_positions


def _add_example(digest: Any, ids: ArrayLike, labels: ArrayLike) -> None:
    """Adds an example's tokens to a fingerprint."""
    for array in (ids, labels):
        digest.update(np.asarray(array, dtype="<i8").tobytes())
        digest.update(b"|")


def _origins(examples: Dataset) -> np.ndarray | None:
    """As `Sequences.origins`, of all of the source's sequences."""
    if "document" not in examples.column_names:
        return None
    columns = examples.with_format("numpy", columns=["document", "first_token"])[:]
    documents = np.asarray(columns["document"], dtype=np.int64)
    first_tokens = np.asarray(columns["first_token"], dtype=np.int64)
    if np.array_equal(documents, np.arange(len(examples))) and not first_tokens.any():
        return None
    return np.stack([documents, first_tokens], axis=1)


def collate(sequences: SequenceOf[Sequence]) -> Batch:
    """A batch of sequences, padded on the right to the longest.

    Its inputs are `input_ids` and `labels`, the token to predict at each position, [B, T] int64;
    and, if there is padding, `attention_mask`, 1 at real positions. Padding has token id 0.

    Args:
        sequences: One or more sequences.
    """
    longest = max(len(sequence.inputs) for sequence in sequences)
    input_ids = np.zeros((len(sequences), longest), dtype=np.int64)
    labels = np.full((len(sequences), longest), NO_LABEL, dtype=np.int64)
    mask = np.zeros((len(sequences), longest), dtype=np.int64)
    for k, sequence in enumerate(sequences):
        length = len(sequence.inputs)
        input_ids[k, :length] = sequence.inputs
        labels[k, :length] = sequence.targets
        mask[k, :length] = 1
    arrays = {"input_ids": input_ids, "labels": labels}
    if not mask.all():
        arrays["attention_mask"] = mask
    indices = tuple(sequence.index for sequence in sequences)
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Batch.of(indices, inputs, {"": Grid.of(indices, mask)})


def pack(sequences: SequenceOf[Sequence]) -> Batch:
    """A batch of sequences concatenated to one, without padding.

    Its inputs are `input_ids`, `labels` and `position_ids`, [1, M] int64; `position_ids` begin at 0
    for each sequence.

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
