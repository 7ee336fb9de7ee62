"""Sequences from data that is tokenised already: a list, a `datasets.Dataset`, a `DataLoader`.

Reads causal language modelling examples and refuses what a sequence of tokens and labels cannot
represent. Knows no tokenizer and no model.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from datasets import Dataset

from ekfac_dist.data.batches import NO_LABEL
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.errors import DataError


def from_examples(
    data: Any, max_tokens: int | None = None, inputs: Collection[str] = ()
) -> Sequences:
    """Sequences from data that is tokenised already.

    A sequence is tokens and labels alone, and the model counts its positions from 0. Fields that
    would change the model's output are refused. `position_ids` 0, 1, 2, … and `token_type_ids` 0 at
    the real positions are the default, and accepted.

    Args:
        data: A `datasets.Dataset`, or any iterable of examples or batches (a `DataLoader`, a list):
            each a mapping with `input_ids` and optionally `labels` (−100 for none; default: every
            token) and `attention_mask` (0 for padding, on either side). Padding is removed here,
            whatever its ids. Every worker must pass the whole data, in the same order.
        max_tokens: Longer sequences are cut to this many tokens; None leaves them whole.
        inputs: Names of the model's inputs. An example with such a field that a sequence does not
            keep is refused; other fields are ignored.

    Raises:
        DataError: If there is no example; if an example lacks `input_ids`, or its fields have
            different lengths; if a token id is no integer of 0 or more; if an `attention_mask` has
            zeros inside, or values other than 0 and 1; or if there are inputs that a sequence does
            not keep.
    """
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "tokens_cut": []}
    for item in data:
        for ids, labels in _split_item(item, inputs, first_index=len(columns["input_ids"])):
            limit = len(ids) if max_tokens is None else max_tokens
            columns["input_ids"].append(ids[:limit])
            columns["labels"].append(labels[:limit])
            columns["tokens_cut"].append(max(0, len(ids) - limit))
    if not columns["input_ids"]:
        raise DataError("The data has no sequences.")
    return Sequences(Dataset.from_dict(columns))


def _split_item(
    item: Any, inputs: Collection[str], first_index: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids and labels, without padding, of each sequence of an example or a batch.

    Args:
        item: The example or batch.
        inputs: Names of the model's inputs.
        first_index: Index in the data of the item's first sequence.
    """
    if not isinstance(item, Mapping) or "input_ids" not in item:
        raise DataError(
            f"The data holds a {type(item).__name__} without 'input_ids'; give mappings "
            "with 'input_ids' and, if wanted, 'attention_mask' and 'labels'."
        )
    _refuse_other_inputs(item, {"inputs_embeds", *inputs}, first_index)
    ids = _arrays_of(item, "input_ids")
    labels = _arrays_of(item, "labels") if item.get("labels") is not None else ids
    masks = [np.ones_like(array) for array in ids]
    if item.get("attention_mask") is not None:
        masks = _arrays_of(item, "attention_mask")
    if not _lengths(ids) == _lengths(labels) == _lengths(masks):
        raise DataError(
            "An example's input_ids, labels and attention_mask have different lengths: "
            f"{_lengths(ids)}, {_lengths(labels)} and {_lengths(masks)}."
        )
    real_parts = [_unpadded_part(mask, first_index + k) for k, mask in enumerate(masks)]
    _refuse_positions_and_types(item, masks, real_parts, first_index)
    for own_ids, own_labels, real_part in zip(ids, labels, real_parts, strict=True):
        own_ids, own_labels = own_ids[real_part], own_labels[real_part]
        given_labels = own_labels[own_labels != NO_LABEL]
        if np.min(own_ids, initial=0) < 0 or np.min(given_labels, initial=0) < 0:
            raise DataError(
                "An example holds a token id below 0; ids are 0 or more, and a label that is "
                f"none is {NO_LABEL}."
            )
        yield own_ids, own_labels


# End of an error: what to do instead.
_TASK = "give a Task of your own, whose batches keep it"


def _unpadded_part(mask: np.ndarray, index: int) -> slice:
    """The contiguous part of an `attention_mask` that is 1.

    Args:
        mask: Zeros and ones [T].
        index: The example's index in the data, for errors.

    Raises:
        DataError: If the mask holds other values, or zeros between ones.
    """
    invalid = mask[(mask != 0) & (mask != 1)]
    if invalid.size:
        raise DataError(
            f"Example {index} has {invalid[0]} in its attention_mask; it must be 1 at real tokens "
            "and 0 at padding."
        )
    real_positions = np.flatnonzero(mask)
    if not real_positions.size:
        return slice(0, 0)
    real_part = slice(int(real_positions[0]), int(real_positions[-1]) + 1)
    if real_part.stop - real_part.start != real_positions.size:
        gap = real_part.start + int(np.argmin(mask[real_part]))
        raise DataError(
            f"Example {index} has an attention_mask with zeros inside (at position {gap}): the "
            "tokens on both sides would be read as if they were adjacent. Only padding at its ends "
            "may be 0; leave tokens that are not to be read out of the example."
        )
    return real_part


def _refuse_other_inputs(example: Mapping[str, Any], inputs: Collection[str], index: int) -> None:
    """Refuses model inputs that a sequence does not keep; scalars such as flags are allowed."""
    representable = {"input_ids", "labels", "attention_mask", "position_ids", "token_type_ids"}
    for name in sorted(set(map(str, example)) & (set(inputs) - representable)):
        if not (example[name] is None or isinstance(example[name], (bool, int, str))):
            raise DataError(
                f"Example {index} has {name}, which the model takes, but a causal language "
                f"model's sequence is input_ids and labels alone; leave it out, or {_TASK}."
            )


def _refuse_positions_and_types(
    example: Mapping[str, Any], masks: list[np.ndarray], real_parts: list[slice], first_index: int
) -> None:
    """Refuses `position_ids` and `token_type_ids` other than the model's default."""
    for name, default, rule in (
        ("position_ids", np.arange, "positions are counted 0, 1, 2, … from its first real token"),
        ("token_type_ids", np.zeros, "a causal language model's sequence has no token types but 0"),
    ):
        if example.get(name) is None:
            continue
        arrays = _arrays_of(example, name)
        if _lengths(arrays) != _lengths(masks):
            raise DataError(
                f"Example {first_index} has {name} of lengths {_lengths(arrays)}, but "
                f"input_ids of lengths {_lengths(masks)}; leave {name} out."
            )
        for index, (values, real_part) in enumerate(
            zip(arrays, real_parts, strict=True), start=first_index
        ):
            if (values[real_part] != default(len(values[real_part]))).any():
                shown = ", ".join(map(str, values[real_part][:4].tolist()))
                raise DataError(
                    f"Example {index} has {name} of its own ({shown}, …), but {rule}; "
                    f"leave {name} out, or {_TASK}."
                )


def _arrays_of(example: Mapping[str, Any], column: str) -> list[np.ndarray]:
    """One int64 array per sequence, from an example's field (one dimension) or a batch's (two)."""
    value = as_array(example[column])
    if isinstance(value, np.ndarray):
        arrays = list(value) if value.ndim == 2 else [value]
    elif isinstance(value, (list, tuple)) and value and np.ndim(value[0]):
        arrays = [np.asarray(as_array(array)) for array in value]  # lengths may differ
    else:
        arrays = [np.asarray(value)]
    if any(array.ndim != 1 or (array.size and array.dtype.kind not in "iub") for array in arrays):
        raise DataError(
            f"An example's {column} is no sequence of whole numbers, nor a batch of them; give a "
            "tensor, an array or a list."
        )
    return [array.astype(np.int64) for array in arrays]


def _lengths(arrays: list[np.ndarray]) -> list[int]:
    return [len(array) for array in arrays]


def as_array(value: Any) -> Any:
    """A tensor as an array on the CPU; any other value unchanged."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value
