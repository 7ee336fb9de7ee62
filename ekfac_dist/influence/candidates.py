"""Candidates: the only sequences that are to be scored, as they are read and picked. No queries."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ekfac_dist.data.examples import Examples
from ekfac_dist.errors import DataError, first_line


def read_candidates(candidates: list[int] | str | None) -> list[int] | None:
    """The indices, in the data, of the only sequences that are to be scored; None: all are.

    Args:
        candidates: The indices; or the path of a file that holds them: as a JSON list, or one in
            each line.

    Raises:
        DataError: If the file cannot be read, or holds something else.
    """
    if not isinstance(candidates, str):
        return candidates
    try:
        text = Path(os.path.expanduser(candidates)).read_text(encoding="utf-8")
        indices = json.loads(text) if text.lstrip().startswith("[") else [*map(int, text.split())]
    except OSError as error:
        raise DataError(
            f"The candidates {candidates} cannot be read: {error.strerror or error}. Give a file "
            "of row numbers, or a list of them, such as [3,5]."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"The candidates {candidates} are no list of row numbers ({first_line(error)}); give a "
            "JSON list, or a row number in each line."
        ) from error
    return indices


def pick_candidates(sequences: Examples, candidates: Sequence[int] | None) -> np.ndarray:
    """Indices, into `sequences`, of those that are to be scored, in data order.

    Args:
        sequences: The training sequences that have labels.
        candidates: Indices in the data, which counts sequences without labels too; None: all.

    Raises:
        DataError: If a candidate is no integer, is not in the data, is given twice, or has no
            label; or if there are none.
    """
    if candidates is None:
        return np.arange(len(sequences))
    if not len(candidates):
        raise DataError("scores.candidates is empty; give at least one row, or null for all.")
    wrong = [c for c in candidates if isinstance(c, bool) or not isinstance(c, (int, np.integer))]
    if wrong:
        raise DataError(f"scores.candidates holds {wrong[0]!r}; rows are whole numbers from 0.")
    last = sequences.counts.rows - 1
    outside = [c for c in candidates if not 0 <= c <= last]
    if outside:
        raise DataError(
            f"scores.candidates holds {outside[0]}, but the data has rows 0 to {last}; give rows "
            "that it has."
        )
    indices, times = np.unique(np.array(candidates, dtype=np.int64), return_counts=True)
    if (times > 1).any():
        raise DataError(
            f"scores.candidates holds {indices[times > 1][0]} more than once; give each row once."
        )
    is_labelled = np.isin(indices, sequences.indices)
    if not is_labelled.all():
        raise DataError(
            f"scores.candidates holds {indices[~is_labelled][0]}, but that row has no label to "
            "learn from, so its gradient is zero; leave it out."
        )
    return np.searchsorted(sequences.indices, indices)
