"""Queries, from texts or from examples: tokenised, and put into query groups.

A query is a completion after a prompt; or a text, whose prompt is empty; or a chat, whose
completion is what its last turn adds to the messages before it. Its loss is the sum of −log p over
the completion's tokens, as a training sequence's loss is over its own labels.

A contrast is a query with a second completion that it is against; its loss is that of the first
less that of the second, each in a sequence of its own.

A query group is what has scores of its own: one query, or several queries of one group name, whose
losses are summed. Scores are a matrix of query groups × training sequences.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset

from ekfac_dist.data.batches import NO_LABEL
from ekfac_dist.data.chats import rendered, require_template
from ekfac_dist.data.examples import Examples
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.data.tokenizing import encode, require_offsets
from ekfac_dist.errors import DataError
from ekfac_dist.influence.query_texts import OPTIONAL, Query


@dataclass(frozen=True)
class QuerySet:
    """Tokenised queries, and their groups.

    Attributes:
        sequences: One sequence per query, in the order given; then one per contrast, of the text
            that it is against. All have labels.
        members: Indices of the queries of each query group; groups are in the order of their first
            queries.
        group_names: Name of each group; None for a query without one.
        against: For each query the index of the sequence that it is against; None: no contrast.
        texts: The queries' texts; None where they were given as examples.
        split_tokens: For each sequence of texts the token that begins in its prompt and ends in its
            completion, and so carries no label; None where there is no such token.
    """

    sequences: Examples
    members: tuple[tuple[int, ...], ...]
    group_names: tuple[str | None, ...]
    against: tuple[int | None, ...]
    texts: tuple[Query, ...] | None = None
    split_tokens: tuple[str | None, ...] = ()

    def __len__(self) -> int:
        return len(self.against)

    def sequences_of(self, group: int) -> list[int]:
        """Indices of a query group's sequences, each query's before the one that it is against."""
        pairs = ((query, self.against[query]) for query in self.members[group])
        return [sequence for pair in pairs for sequence in pair if sequence is not None]

    def is_subtracted(self, sequence: int) -> bool:
        """Whether a sequence is what a contrast is against, so that its loss is subtracted."""
        return sequence >= len(self)

    def name_of(self, sequence: int) -> str:
        """What errors call a sequence."""
        if self.is_subtracted(sequence):
            return f"what query {self.against.index(sequence)} (from 0) is against"
        return f"query {sequence} (from 0)"

    @property
    def split_notes(self) -> list[str]:
        """A sentence for each query whose prompt ends inside a token."""
        pairs = zip(_sides(self.texts or ()), self.split_tokens, strict=True)
        return [f"{query.where}: {_split_note(query, token)}" for query, token in pairs if token]


def _sides(queries: Sequence[Query]) -> list[Query]:
    """The queries, and then what the contrasts among them are against."""
    return [*queries, *(query.other_side() for query in queries if query.against is not None)]


def _split_note(query: Query, token: str) -> str:
    advice = "end the prompt where a token ends"
    if query.prompt.endswith(" "):
        advice = "end the prompt without the space and begin the completion with it"
    return (
        f"the token {token!r} begins in the prompt and ends in the completion, so it carries no "
        f"label; {advice}"
    )


def tokenize_queries(queries: Sequence[Query], tokenizer: Any, context: int | None) -> QuerySet:
    """Tokenises queries as training text is tokenised: prompt and completion together.

    Chats are rendered first, by the tokenizer's template.

    Args:
        queries: One or more queries.
        tokenizer: A `transformers` tokenizer.
        context: The longest input that the model reads, in tokens; None: no limit.

    Raises:
        DataError: If a query, which is named, or what it is against has no token to predict or is
            longer than the model's context; if the two are the same tokens; or if queries have
            prompts, and the tokenizer does not say where tokens begin.
    """
    queries = [_rendered(query, tokenizer) for query in queries]
    if any(query.prompt for query in queries):
        require_offsets(tokenizer, "a prompt")
    sides = _sides(queries)
    columns = _encoded(sides, tokenizer)
    split_tokens = tuple(columns["split_token"])
    tokens = list(zip(columns["input_ids"], columns["labels"], strict=True))
    for side, (ids, labels), split in zip(sides, tokens, split_tokens, strict=True):
        labelled = [t for t, label in enumerate(labels) if t and label != NO_LABEL]
        if not labelled:
            raise DataError(
                f"{side.where}: no token begins in the completion {side.completion!r} with "
                "another before it, so there is nothing to predict; "
                f"{_split_note(side, split) if split else 'give a longer one'}."
            )
        if context is not None and labelled[-1] > context:
            raise DataError(
                f"{side.where}: has {len(ids)} tokens, but the model reads {context} at most; "
                "shorten it."
            )
    against = _places_of_others([query.against is not None for query in queries])
    for query, own, other in zip(queries, tokens, against, strict=False):
        if other is not None and own == tokens[other]:
            raise DataError(
                f"{query.where}: completion and against are different texts of the same tokens, so "
                "the two differ by nothing; give another text, or leave it out."
            )
    return _grouped(
        Sequences(Dataset.from_dict(columns)),
        [query.group for query in queries],
        against,
        tuple(queries),
        split_tokens,
    )


def _places_of_others(is_contrast: Sequence[bool]) -> tuple[int | None, ...]:
    """As `QuerySet.against`, from whether each query is a contrast."""
    places = itertools.count(len(is_contrast))
    return tuple(next(places) if one else None for one in is_contrast)


def _rendered(query: Query, tokenizer: Any) -> Query:
    """The query with its prompt and completion, if it is a chat."""
    if query.messages is None:
        return query
    require_template(tokenizer, f"{query.where}: messages")
    prompt, completion = rendered(query.messages, tokenizer, query.where)
    against = None
    if query.against is not None:
        *before, last = query.messages
        other = [*before, {**last, "content": query.against}]
        _, against = rendered(other, tokenizer, f"{query.where}, against")
    return replace(query, prompt=prompt, completion=completion, against=against)


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
        data: The examples, as `read` takes them; the mapping of a single query may have a "group",
            and as "against" another example, whose loss is subtracted.
        read: Reads examples of the task.

    Raises:
        DataError: As `read` raises it; or if a query, or what it is against, has no label, the two
            are the same, or a batch has a "group" or an "against".
    """
    examples = list(data)
    own_fields = [example if isinstance(example, Mapping) else {} for example in examples]
    groups = [fields.get("group") for fields in own_fields]
    others = [fields.get("against") for fields in own_fields]
    examples = [_without_own_fields(example) for example in examples]
    sequences = _labelled(examples, read)
    if len(groups) != len(sequences):
        if any(field is not None for field in (*groups, *others)):
            raise DataError(
                "A batch of queries has a 'group' or an 'against', which are one query's; give "
                "queries one by one."
            )
        groups = others = [None] * len(sequences)
    contrasts = [query for query, other in enumerate(others) if other is not None]
    for query in contrasts:
        _require_other_example(query, examples[query], others[query], read)
    if contrasts:
        sequences = read([*examples, *(others[query] for query in contrasts)])
    return _grouped(sequences, groups, _places_of_others([other is not None for other in others]))


def _without_own_fields(example: Any) -> Any:
    """An example of the task alone."""
    if not isinstance(example, Mapping):
        return example
    return {name: value for name, value in example.items() if name not in OPTIONAL}


def _labelled(examples: list[Any], read: Callable[[list[Any]], Examples]) -> Examples:
    """The examples of queries; all have labels."""
    try:
        sequences = read(examples)
    except DataError as error:
        error.args = (f"Of the queries: {error}",)
        raise
    if sequences.counts.unlabelled:
        unlabelled = min(set(range(sequences.counts.rows)) - set(sequences.indices.tolist()))
        raise DataError(
            f"Query {unlabelled} (from 0) has no label, so there is nothing to predict; label at "
            "least one of its tokens after the first."
        )
    return sequences


def _require_other_example(
    query: int, example: Any, other: Any, read: Callable[[list[Any]], Examples]
) -> None:
    """Refuses what a query of examples cannot be against.

    Args:
        query: The query's index, for errors.
        example: Its example.
        other: What it is against.
        read: Reads examples of the task.
    """
    if not isinstance(other, Mapping):
        raise DataError(
            f"Query {query} (from 0) is against {other!r}; what an example is against is another "
            "example, with fields as its own."
        )
    try:
        sequences = read([other])
    except DataError as error:
        error.args = (f"Of what query {query} (from 0) is against: {error}",)
        raise
    if len(sequences) != 1:
        raise DataError(
            f"Query {query} (from 0) is against a batch of {len(sequences)}; give one example."
        )
    if sequences.fingerprint == read([example]).fingerprint:
        raise DataError(
            f"Query {query} (from 0) is against itself, so the two differ by nothing; give another "
            "example, or leave it out."
        )


def _grouped(
    sequences: Examples,
    groups: Iterable[str | None],
    against: tuple[int | None, ...],
    texts: tuple[Query, ...] | None = None,
    split_tokens: tuple[str | None, ...] = (),
) -> QuerySet:
    """The query set of some queries.

    Args:
        sequences: The queries' sequences, and those that they are against.
        groups: The name of each query's group; None where it has none.
        against: As `QuerySet.against`.
        texts: As `QuerySet.texts`.
        split_tokens: As `QuerySet.split_tokens`.
    """
    # By name; a query without one has its own index as its key.
    members: dict[str | int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(index if group is None else group, []).append(index)
    names = tuple(key if isinstance(key, str) else None for key in members)
    groups_of_queries = tuple(map(tuple, members.values()))
    return QuerySet(sequences, groups_of_queries, names, against, texts, split_tokens)
