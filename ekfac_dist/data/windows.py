"""Sequences that are no longer than a limit: the beginning of each document, or windows over it.

With max_tokens T and a stride S, the windows of a document of L tokens begin at 0, S, 2S, … and
have T tokens each, the last one fewer. A token has a label in one window only, the first in which
it follows another token:

    tokens      0 1 2 3 4 5 6 7 8 9        T = 6, S = 4
    window 0    . 1 2 3 4 5
    window 1            . . 6 7 8 9        4 and 5 are read, and carry no label again

So windows overlap by T − S tokens, one at least, that only give context. Knows numbers only.
"""

from collections.abc import Mapping
from typing import Any

from ekfac_dist.data.batches import NO_LABEL

# Columns of a tokenised data set: `document` is the index of a sequence's example in the source,
# `first_token` where in that example's tokens it begins.
COLUMNS = ("input_ids", "labels", "tokens_cut", "split_token", "document", "first_token")


def window_starts(num_tokens: int, max_tokens: int, stride: int) -> range:
    """Where the windows of a document begin.

    Args:
        num_tokens: Its tokens, L.
        max_tokens: The most tokens of a window, T.
        stride: From a window's first token to the next one's, S < T.
    """
    num_further = max(0, -(-(num_tokens - max_tokens) // stride))
    return range(0, (num_further + 1) * stride, stride)


def in_parts(
    documents: Mapping[str, list[Any]], max_tokens: int, stride: int | None
) -> dict[str, list[Any]]:
    """Cuts documents to their beginnings, or into windows.

    Args:
        documents: The columns of `COLUMNS`, a document in each row; `labels` are −100 for none.
        max_tokens: The most tokens of a sequence.
        stride: Of the windows; None: only the beginning of each document is kept.

    Returns:
        The same columns, a sequence in each row. A split token is told of its first window.
    """
    parts: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for row in zip(*(documents[name] for name in COLUMNS), strict=True):
        ids, labels, tokens_cut, split_token, document, first_token = row
        starts = range(1) if stride is None else window_starts(len(ids), max_tokens, stride)
        labelled_before = 0
        for start in starts:
            end = min(len(ids), start + max_tokens)
            own_labels = list(labels[start:end])
            own_labels[: labelled_before - start] = [NO_LABEL] * max(0, labelled_before - start)
            labelled_before = end
            parts["input_ids"].append(ids[start:end])
            parts["labels"].append(own_labels)
            parts["tokens_cut"].append(tokens_cut + (len(ids) - end if stride is None else 0))
            parts["split_token"].append(split_token if start == 0 else None)
            parts["document"].append(document)
            parts["first_token"].append(first_token + start)
    return parts
