"""Reads the queries and training sequences that a Python caller gives: as text, or tokenised.

Knows tokenizers and tasks; not the command's files, which `queries` reads.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Dataset
from torch import nn

from ekfac_dist.data.chats import messages_of, rendered, require_template
from ekfac_dist.data.examples import Examples
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.data.tokenizing import encode, require_offsets
from ekfac_dist.errors import ConfigError, DataError
from ekfac_dist.influence.queries import QuerySet, query_examples, tokenize_queries
from ekfac_dist.influence.query_texts import parse_query
from ekfac_dist.models.capture.task_examples import read_examples
from ekfac_dist.models.capture.tasks import CausalLM, Task
from ekfac_dist.models.load.pretrained import context_length


def queries_of(queries: Iterable[Any], tokenizer: Any, model: nn.Module, task: Task) -> QuerySet:
    """The queries, from text or from examples.

    Each text whose prompt ends inside a token is a warning at the line that called this function's
    caller.

    Args:
        queries: Mappings with "prompt" and "completion", or "text"; or examples of the task.
        tokenizer: A `transformers` tokenizer; needed for text only.
        model: The model.
        task: The model's task; only a causal language model's queries may be text.

    Raises:
        DataError: If there are no queries, or one is malformed.
        ConfigError: If they are text, and there is no tokenizer.
    """
    items = list(queries)
    if not items:
        raise DataError("There are no queries; give at least one.")
    is_text = any(not (isinstance(item, Mapping) and "input_ids" in item) for item in items)
    if not is_text or not isinstance(task, CausalLM):
        return query_examples(items, lambda examples: read_examples(task, model, examples, None))
    context = context_length(model)
    _require_tokenizer(tokenizer, "queries")
    texts = []
    for index, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise DataError(f"Query {index} is {type(item).__name__}; give mappings.")
        texts.append(parse_query(item, f"query {index}", index))
    query_set = tokenize_queries(texts, tokenizer, context)
    for note in query_set.split_notes:
        warnings.warn(note, stacklevel=3)
    return query_set


def sequences_of(
    train: Iterable[Any], tokenizer: Any, max_tokens: int | None, model: nn.Module, task: Task
) -> Examples:
    """The training sequences, from text or from examples.

    Texts whose prompts end inside a token are one warning at the line that called this function's
    caller.

    Args:
        train: Mappings with "text" and perhaps "prompt", or with "messages"; or examples of the
            task.
        tokenizer: A `transformers` tokenizer; needed for text only.
        max_tokens: Longer sequences are cut to this many tokens; None leaves them whole.
        model: The model.
        task: The model's task; only a causal language model's sequences may be text.

    Raises:
        DataError: If there are no sequences, or one is malformed.
        ConfigError: If they are text, and there is no tokenizer.
    """
    items = train if hasattr(train, "__getitem__") else list(train)
    first = next(iter(items), None)
    if isinstance(first, Mapping) and "messages" in first and isinstance(task, CausalLM):
        _require_tokenizer(tokenizer, "training sequences")
        return _chats_of(items, tokenizer, max_tokens)
    is_text = isinstance(first, Mapping) and "text" in first and "input_ids" not in first
    if not is_text or not isinstance(task, CausalLM):
        return read_examples(task, model, items, max_tokens)
    _require_tokenizer(tokenizer, "training sequences")
    prompts = [_text_of(item, index, "prompt") for index, item in enumerate(items)]
    texts = [_text_of(item, index, "text") for index, item in enumerate(items)]
    columns = encode(tokenizer, prompts, texts, max_tokens)
    sequences = Sequences(Dataset.from_dict(columns))
    if sequences.counts.split_note:
        warnings.warn(f"Training sequences: {sequences.counts.split_note}", stacklevel=3)
    return sequences


def _chats_of(items: Iterable[Any], tokenizer: Any, max_tokens: int | None) -> Sequences:
    """Training sequences that are chats."""
    require_template(tokenizer, "messages")
    require_offsets(tokenizer, "messages")
    pairs = []
    for index, item in enumerate(items):
        where = f"training sequence {index}"
        messages = item.get("messages") if isinstance(item, Mapping) else item
        pairs.append(rendered(messages_of(messages, where), tokenizer, where))
    prompts, texts = [list(side) for side in zip(*pairs, strict=True)]
    columns = encode(tokenizer, prompts, texts, max_tokens, add_special_tokens=False)
    return Sequences(Dataset.from_dict(columns))


def _text_of(item: Any, index: int, field: str) -> str:
    """A text field of one training sequence; "" where it has none."""
    if not isinstance(item, Mapping) or "text" not in item:
        raise DataError(
            f"Training sequence {index} is {type(item).__name__} without 'text', though the first "
            "one has it; give mappings with 'text', one for each sequence."
        )
    text = item.get(field)
    if text is not None and not isinstance(text, str):
        raise DataError(
            f"Training sequence {index}: {field} is {type(text).__name__}; it must be text, of one "
            "sequence."
        )
    return text or ""


def _require_tokenizer(tokenizer: Any, texts: str) -> None:
    if tokenizer is None:
        raise ConfigError(f"The {texts} are text, but there is no tokenizer; give tokenizer=….")
