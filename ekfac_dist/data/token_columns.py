"""Data that is tokenised already: a column of ids, perhaps with a label mask and documents.

A row is one sequence as a model was trained on it, or, with the places where documents begin,
several sequences that do not see each other. Knows no tokenizer and no model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from datasets import List as ListOf

from ekfac_dist.config import DataConfig
from ekfac_dist.data.batches import NO_LABEL
from ekfac_dist.data.windows import COLUMNS
from ekfac_dist.errors import DataError, first_line

LARGEST_ID = 2**31 - 1


def read_npy(path: Path, column: str) -> Dataset:
    """The rows of a NumPy file of token ids.

    Args:
        path: A .npy file with an array of integers: [rows, tokens], or [tokens] of one row.
        column: The name of the column that they become.

    Raises:
        DataError: If it holds something else.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path} is not what its ending .npy says: {first_line(error)}.") from error
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        raise DataError(
            f"{path} holds an array of {array.dtype} of shape {list(array.shape)}; it must be of "
            "integers, [rows, tokens] or [tokens]."
        )
    rows = np.atleast_2d(array)
    if rows.size and not 0 <= int(rows.min()) <= int(rows.max()) <= LARGEST_ID:
        wrong = int(rows.min()) if rows.min() < 0 else int(rows.max())
        raise DataError(f"{path} holds {wrong}; token ids are from 0 to {LARGEST_ID}.")
    features = Features({column: ListOf(Value("int32"))})
    return Dataset.from_generator(
        _rows_of, features=features, gen_kwargs={"array": rows, "column": column}
    )


def _rows_of(array: np.ndarray, column: str) -> Any:
    for row in array:
        yield {column: np.asarray(row, dtype=np.int32)}


def documents_of(
    columns: Mapping[str, Sequence[Any]], indices: Sequence[int], config: DataConfig
) -> dict[str, list[Any]]:
    """The documents of some rows, with the columns of `windows.COLUMNS`.

    Args:
        columns: The rows' columns.
        indices: The rows' indices in the source.
        config: Which columns hold tokens, label mask and documents.

    Raises:
        DataError: If a row holds something else.
    """
    assert config.tokens is not None
    found: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for k, index in enumerate(indices):
        ids = _integers(columns[config.tokens][k], config.tokens, index, LARGEST_ID)
        labels = ids.copy()
        if config.label_mask is not None:
            mask = _integers(columns[config.label_mask][k], config.label_mask, index, 1)
            if len(mask) != len(ids):
                raise DataError(
                    f"Row {index} has {len(ids)} tokens, but {len(mask)} values in "
                    f"{config.label_mask!r}; it must have one for each token."
                )
            labels[mask == 0] = NO_LABEL
        starts = [0]
        if config.documents is not None:
            starts = _starts(columns[config.documents][k], config.documents, index, len(ids))
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            own = (ids[start:end], labels[start:end], 0, None, index, start)
            for name, value in zip(COLUMNS, own, strict=True):
                found[name].append(value)
    return found


def _integers(value: Any, column: str, index: int, largest: int) -> np.ndarray:
    """A row's integers from 0 to a largest one [T] int64; none for a missing value."""
    array = np.asarray([] if value is None else value)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iub"):
        raise DataError(
            f"Column {column!r} holds no list of whole numbers in row {index} (from 0), but "
            f"{_shown(value)}."
        )
    wrong = array[(array < 0) | (array > largest)]
    if wrong.size:
        raise DataError(
            f"Column {column!r} holds {wrong[0]} in row {index} (from 0); it must hold whole "
            f"numbers from 0 to {largest}."
        )
    return array.astype(np.int64)


def _starts(value: Any, column: str, index: int, num_tokens: int) -> list[int]:
    """Where the documents of a row begin."""
    starts = _integers(value, column, index, max(0, num_tokens - 1)).tolist()
    if num_tokens and (starts[:1] != [0] or starts != sorted(set(starts))):
        raise DataError(
            f"Column {column!r} holds {_shown(starts)} in row {index} (from 0); it must hold the "
            "place of each document's first token in the row, ascending from 0."
        )
    return starts or [0]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
