"""Queries: read from a file or given as examples, tokenised, and put into query groups.

A query is a completion after a prompt; or a text, whose prompt is empty; or a chat, whose
completion is what its last turn adds to the messages before it. Its loss is the sum of −log p over
the completion's tokens, as a training sequence's loss is over its own labels.

A query group is what has scores of its own: one query, or several queries of one group name, whose
losses are summed. Scores are a matrix of query groups × training sequences.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ekfac_dist.data.batches import NO_LABEL
from ekfac_dist.data.chats import messages_of, rendered, require_template
from ekfac_dist.data.examples import Examples
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.data.tokenizing import encode, require_offsets
from ekfac_dist.errors import DataError, first_line


@dataclass(frozen=True)
class Query:
    """The text of one query.

    Attributes:
        prompt: The text before the completion; its tokens carry no label. May be empty.
        completion: The text whose log-probability the query is about.
        group: Name of its query group; None: the query is a group of its own.
        messages: The chat that prompt and completion are rendered from, which are "" until then;
            None for a text.
        line: Line of the file, from 1; of a query from Python its index, from 0.
        where: The query's name in errors.
    """

    prompt: str
    completion: str
    group: str | None
    line: int
    where: str
    messages: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True)
class QuerySet:
    """Tokenised queries, and their groups.

    Attributes:
        sequences: One sequence per query, in the order given; all have labels.
        members: Indices of the queries of each query group; groups are in the order of their first
            queries.
        group_names: Name of each group; None for a query without one.
        texts: The queries' texts; None where they were given as examples.
        split_tokens: For each text the token that begins in its prompt and ends in its completion,
            and so carries no label; None where there is no such token.
    """

    sequences: Examples
    members: tuple[tuple[int, ...], ...]
    group_names: tuple[str | None, ...]
    texts: tuple[Query, ...] | None = None
    split_tokens: tuple[str | None, ...] = ()

    @property
    def split_notes(self) -> list[str]:
        """A sentence for each query whose prompt ends inside a token."""
        pairs = zip(self.texts or (), self.split_tokens, strict=True)
        return [f"{query.where}: {_split_note(query, token)}" for query, token in pairs if token]


def _split_note(query: Query, token: str) -> str:
    advice = "end the prompt where a token ends"
    if query.prompt.endswith(" "):
        advice = "end the prompt without the space and begin the completion with it"
    return (
        f"the token {token!r} begins in the prompt and ends in the completion, so it carries no "
        f"label; {advice}"
    )


def read_queries(path: str | Path) -> list[Query]:
    """Reads the queries of a JSONL file.

    Args:
        path: A file of JSON objects, one a line, each with "prompt" and "completion", or "text", or
            "messages", and perhaps a "group"; blank lines and other fields are ignored.

    Raises:
        DataError: If the file cannot be read or holds no query, or one of its lines, which is
            named, is no query.
    """
    queries = []
    try:
        with Path(path).open("rb") as opened:
            for number, line in enumerate(opened, start=1):
                if line.strip():
                    queries.append(_parse_line(line, f"{path}, line {number}", number))
    except OSError as error:
        raise DataError(
            f"The queries {path} cannot be read: {error.strerror or error}. Give a .jsonl file."
        ) from error
    if not queries:
        raise DataError(f"{path} holds no query; {_LINE_ADVICE}.")
    return queries


_LINE_ADVICE = 'each line must be {"prompt": …, "completion": …}, {"text": …} or {"messages": […]}'


def _parse_line(line: bytes, where: str, number: int) -> Query:
    try:
        # Some editors put a byte order mark before the first line.
        fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: is not UTF-8 text ({error.reason} at byte {error.start + 1}); save the file "
            "as UTF-8."
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: is not JSON ({error.msg}: column {error.colno}); {_LINE_ADVICE}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON ({first_line(error)}); {_LINE_ADVICE}.") from error
    if not isinstance(fields, dict):
        raise DataError(f"{where}: is {type(fields).__name__}, not an object; {_LINE_ADVICE}.")
    return parse_query(fields, where, number)


def parse_query(fields: Mapping[str, Any], where: str, line: int) -> Query:
    """A query from its fields.

    Args:
        fields: "prompt" and "completion", or "text", or "messages", and perhaps a "group"; others
            are ignored.
        where: The query's name in errors.
        line: Its line, or its index.

    Raises:
        DataError: If a field is missing, superfluous, empty, or no text.
    """
    kinds = ("prompt", "completion", "text", "messages")
    names = [name for name in kinds if fields.get(name) is not None]
    if names not in (["prompt", "completion"], ["text"], ["messages"]):
        present = " and ".join(names or map(str, fields)) or "no text"
        raise DataError(f"{where}: has {present}; {_LINE_ADVICE}.")
    group = fields.get("group") or None
    messages = None
    if names == ["messages"]:
        messages = tuple(messages_of(fields["messages"], where))
        names = []
    for name in (*names, *(["group"] if fields.get("group") is not None else [])):
        if not isinstance(fields[name], str):
            raise DataError(f"{where}: {name} is {fields[name]!r}; it must be text.")
        if any("\ud800" <= character <= "\udfff" for character in fields[name]):
            raise DataError(
                f"{where}: {name} is {fields[name]!r}, which holds half of a surrogate pair; give "
                "whole characters."
            )
    if messages is not None:
        return Query("", "", group, line, where, messages)
    completion = fields["text"] if names == ["text"] else fields["completion"]
    if not completion:
        raise DataError(f"{where}: {names[-1]} is empty; it must hold what the query is about.")
    return Query(fields.get("prompt") or "", completion, group, line, where)


def tokenize_queries(queries: Sequence[Query], tokenizer: Any, context: int | None) -> QuerySet:
    """Tokenises queries as training text is tokenised: prompt and completion together.

    Chats are rendered first, by the tokenizer's template.

    Args:
        queries: One or more queries.
        tokenizer: A `transformers` tokenizer.
        context: The longest input that the model reads, in tokens; None: no limit.

    Raises:
        DataError: If a query, which is named, has no token to predict or is longer than the model's
            context; or if queries have prompts, and the tokenizer does not say where tokens begin.
    """
    queries = [_rendered(query, tokenizer) for query in queries]
    if any(query.prompt for query in queries):
        require_offsets(tokenizer, "a prompt")
    columns = _encoded(queries, tokenizer)
    split_tokens = tuple(columns["split_token"])
    encoded = zip(queries, columns["input_ids"], columns["labels"], split_tokens, strict=True)
    for query, ids, labels, split in encoded:
        labelled = [t for t, label in enumerate(labels) if t and label != NO_LABEL]
        if not labelled:
            raise DataError(
                f"{query.where}: no token begins in the completion {query.completion!r} with "
                "another before it, so there is nothing to predict; "
                f"{_split_note(query, split) if split else 'give a longer one'}."
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


def _rendered(query: Query, tokenizer: Any) -> Query:
    """The query with its prompt and completion, if it is a chat."""
    if query.messages is None:
        return query
    require_template(tokenizer, f"{query.where}: messages")
    prompt, completion = rendered(query.messages, tokenizer, query.where)
    return replace(query, prompt=prompt, completion=completion)


def _encoded(queries: Sequence[Query], tokenizer: Any) -> dict[str, list[Any]]:
    """The columns of `encode`; a chat's special tokens are those of its template."""
    columns: dict[str, list[Any]] = {}
    for is_chat, run in itertools.groupby(queries, lambda query: query.messages is not None):
        alike = list(run)
        texts = [query.prompt for query in alike], [query.completion for query in alike]
        encoded = encode(tokenizer, *texts, None, add_special_tokens=not is_chat)
        for name, values in encoded.items():
            columns.setdefault(name, []).extend(values)
    return columns


def query_examples(data: Iterable[Any], read: Callable[[list[Any]], Examples]) -> QuerySet:
    """Queries from examples that are tokenised already.

    Args:
        data: The examples, as `read` takes them; the mapping of a single query may have a "group".
        read: Reads examples of the task.

    Raises:
        DataError: As `read` raises it; or if a query has no label, or a batch has a "group".
    """
    examples = list(data)
    groups = [
        example.get("group") if isinstance(example, Mapping) else None for example in examples
    ]
    try:
        sequences = read([_without_group(example) for example in examples])
    except DataError as error:
        error.args = (f"Of the queries: {error}",)
        raise
    if sequences.counts.unlabelled:
        unlabelled = min(set(range(sequences.counts.rows)) - set(sequences.indices.tolist()))
        raise DataError(
            f"Query {unlabelled} (from 0) has no label, so there is nothing to predict; label at "
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
    """The query set of some queries.

    Args:
        sequences: The queries' sequences.
        groups: The name of each query's group; None where it has none.
        texts: As `QuerySet.texts`.
        split_tokens: As `QuerySet.split_tokens`.
    """
    # By name; a query without one has its own index as its key.
    members: dict[str | int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(index if group is None else group, []).append(index)
    names = tuple(key if isinstance(key, str) else None for key in members)
    return QuerySet(sequences, tuple(map(tuple, members.values())), names, texts, split_tokens)


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
