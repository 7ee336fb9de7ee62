"""Queries: read from a file, or given as examples; tokenised; grouped into rows of scores.

A query is a completion behind a prompt, or a text with an empty prompt. Its loss is the sum of
−log p over the completion's tokens, as a training sequence's is over its own labels. Queries of one
group are summed: they share a row.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ekfac_dist.data.batches import NO_LABEL
from ekfac_dist.data.examples import Examples
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.data.tokenizing import encode, require_offsets
from ekfac_dist.errors import DataError, first_line


@dataclass(frozen=True)
class Query:
    """One query's text.

    Attributes:
        prompt: What comes first and carries no label; may be empty.
        completion: What the query is about.
        group: Name of the group that it is summed with; None: it stands alone.
        line: Where it was read, from 1.
        where: How an error calls it.
    """

    prompt: str
    completion: str
    group: str | None
    line: int
    where: str


@dataclass(frozen=True)
class QuerySet:
    """Tokenised queries, and which of them share a row of scores.

    Attributes:
        sequences: The queries' sequences, in the order given; all have labels.
        rows: Numbers of the queries of each row, in order of the rows' first queries.
        groups: Each row's group; None for a query that stands alone.
        texts: The queries' texts, where they were given as such.
        split_tokens: Of each text the token that begins in its prompt and ends in its completion,
            so that it carries no label; None where there is none.
    """

    sequences: Examples
    rows: tuple[tuple[int, ...], ...]
    groups: tuple[str | None, ...]
    texts: tuple[Query, ...] | None = None
    split_tokens: tuple[str | None, ...] = ()

    @property
    def split_notes(self) -> list[str]:
        """What there is to tell of tokens that prompts' ends split, a sentence for each query."""
        pairs = zip(self.texts or (), self.split_tokens, strict=True)
        return [f"{query.where}: {_split(query, token)}" for query, token in pairs if token]


def _split(query: Query, token: str) -> str:
    advice = "end the prompt where a token ends"
    if query.prompt.endswith(" "):
        advice = "end the prompt without the space and begin the completion with it"
    return (
        f"the token {token!r} begins in the prompt and ends in the completion, so it carries no "
        f"label; {advice}"
    )


def read_queries(path: str | Path) -> list[Query]:
    """The queries of a JSONL file.

    Args:
        path: A file of JSON objects, one a line, each with "prompt" and "completion", or "text",
            and perhaps a "group"; blank lines are passed over, other fields ignored.

    Raises:
        DataError: The file cannot be read or holds no query, or a line, which is named, is none.
    """
    queries = []
    try:
        with Path(path).open("rb") as opened:
            for number, line in enumerate(opened, start=1):
                if line.strip():
                    queries.append(_parse(line, f"{path}, line {number}", number))
    except OSError as error:
        raise DataError(
            f"The queries {path} cannot be read: {error.strerror or error}. Give a .jsonl file."
        ) from error
    if not queries:
        raise DataError(f"{path} holds no query; {_WANTED}.")
    return queries


_WANTED = 'each line must be {"prompt": …, "completion": …} or {"text": …}'


def _parse(line: bytes, where: str, number: int) -> Query:
    try:
        # Some editors put a byte order mark before the first line.
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: is not UTF-8 text ({error.reason} at byte {error.start + 1}); save the file "
            "as UTF-8."
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: is not JSON ({error.msg}: column {error.colno}); {_WANTED}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON ({first_line(error)}); {_WANTED}.") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: is {type(row).__name__}, not an object; {_WANTED}.")
    return parse_query(row, where, number)


def parse_query(row: Mapping[str, Any], where: str, number: int) -> Query:
    """A query from its fields.

    Args:
        row: With "prompt" and "completion", or "text", and perhaps a "group".
        where: How an error calls it.
        number: Its line.

    Raises:
        DataError: It is no query.
    """
    fields = [name for name in ("prompt", "completion", "text") if row.get(name) is not None]
    if fields not in (["prompt", "completion"], ["text"]):
        found = " and ".join(fields or map(str, row)) or "no text"
        raise DataError(f"{where}: has {found}; {_WANTED}.")
    for name in (*fields, *(["group"] if row.get("group") is not None else [])):
        if not isinstance(row[name], str):
            raise DataError(f"{where}: {name} is {row[name]!r}; it must be text.")
        if any("\ud800" <= character <= "\udfff" for character in row[name]):
            raise DataError(
                f"{where}: {name} is {row[name]!r}, which holds half of a surrogate pair; give "
                "whole characters."
            )
    completion = row["text"] if fields == ["text"] else row["completion"]
    if not completion:
        raise DataError(f"{where}: {fields[-1]} is empty; it must hold what the query is about.")
    return Query(row.get("prompt") or "", completion, row.get("group") or None, number, where)


def tokenize_queries(queries: Sequence[Query], tokenizer: Any, context: int | None) -> QuerySet:
    """Tokenises queries as training text is: prompt and completion together.

    Args:
        queries: One or more.
        tokenizer: A `transformers` tokenizer.
        context: The longest input that the model reads; None: no limit.

    Raises:
        DataError: A query, which is named, has nothing to predict, or is longer than the
            model's context; or a prompt cannot be told from what follows.
    """
    if any(query.prompt for query in queries):
        require_offsets(tokenizer, "a prompt")
    columns = encode(
        tokenizer, [query.prompt for query in queries], [q.completion for q in queries], None
    )
    split_tokens = tuple(columns["split_token"])
    encoded = zip(queries, columns["input_ids"], columns["labels"], split_tokens, strict=True)
    for query, ids, labels, split in encoded:
        labelled = [t for t, label in enumerate(labels) if t and label != NO_LABEL]
        if not labelled:
            raise DataError(
                f"{query.where}: no token begins in the completion {query.completion!r} with "
                "another before it, so there is nothing to predict; "
                f"{_split(query, split) if split else 'give a longer one'}."
            )
        if context is not None and labelled[-1] > context:
            raise DataError(
                f"{query.where}: has {len(ids)} tokens, but the model reads {context} at most; "
                "shorten it."
            )
    return _grouped(
        Sequences(Dataset.from_dict(columns)),
        [query.group for query in queries],
        tuple(queries),
        split_tokens,
    )


def query_examples(data: Iterable[Any], read: Callable[[list[Any]], Examples]) -> QuerySet:
    """Queries from examples that are tokenised already, each a row of its own.

    Args:
        data: As `read` takes; a mapping of one query may have a "group".
        read: Reads examples.

    Raises:
        DataError: As `read`; or a query has no label; or a batch has a group.
    """
    given = list(data)
    groups = [example.get("group") if isinstance(example, Mapping) else None for example in given]
    try:
        sequences = read([_without_group(example) for example in given])
    except DataError as error:
        error.args = (f"Of the queries: {error}",)
        raise
    if sequences.counts.unlabelled:
        missing = min(set(range(sequences.counts.rows)) - set(sequences.indices.tolist()))
        raise DataError(
            f"Query {missing} (from 0) has no label, so there is nothing to predict; label at "
            "least one of its tokens after the first."
        )
    if len(groups) != len(sequences):
        if any(group is not None for group in groups):
            raise DataError(
                "A batch of queries has a 'group', which is one query's; give queries one by one."
            )
        groups = [None] * len(sequences)
    return _grouped(sequences, groups)


def _without_group(example: Any) -> Any:
    if not isinstance(example, Mapping):
        return example
    return {name: value for name, value in example.items() if name != "group"}


def _grouped(
    sequences: Examples,
    groups: Iterable[str | None],
    texts: tuple[Query, ...] | None = None,
    split_tokens: tuple[str | None, ...] = (),
) -> QuerySet:
    # A query that stands alone has a key of its own.
    rows: dict[str | int, list[int]] = {}
    for number, group in enumerate(groups):
        rows.setdefault(number if group is None else group, []).append(number)
    names = tuple(key if isinstance(key, str) else None for key in rows)
    return QuerySet(sequences, tuple(map(tuple, rows.values())), names, texts, split_tokens)


def read_candidates(candidates: list[int] | str | None) -> list[int] | None:
    """Rows of the data that alone are to be scored.

    Args:
        candidates: The rows themselves, or a file that holds them: a JSON list, or a row number in
            each line.

    Raises:
        DataError: The file cannot be read, or holds something else.
    """
    if not isinstance(candidates, str):
        return candidates
    try:
        text = Path(os.path.expanduser(candidates)).read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else [*map(int, text.split())]
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
    return rows


def pick_candidates(sequences: Examples, candidates: Sequence[int] | None) -> np.ndarray:
    """Numbers of the sequences that are to be scored, in data order.

    Args:
        sequences: The training sequences.
        candidates: Their rows in the data; None: all.

    Raises:
        DataError: There is no such row, it is no number, is given twice, or has no label.
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
    rows, times = np.unique(np.array(candidates, dtype=np.int64), return_counts=True)
    if (times > 1).any():
        raise DataError(
            f"scores.candidates holds {rows[times > 1][0]} more than once; give each row once."
        )
    found = np.isin(rows, sequences.indices)
    if not found.all():
        raise DataError(
            f"scores.candidates holds {rows[~found][0]}, but that row has no label to learn from, "
            "so its gradient is zero; leave it out."
        )
    return np.searchsorted(sequences.indices, rows)
