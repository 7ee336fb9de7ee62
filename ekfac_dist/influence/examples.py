"""What Python callers give as queries and training sequences: text, or tokens already."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Dataset
from torch import nn

from ekfac_dist.data.examples import Examples
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.data.tokenizing import encode
from ekfac_dist.errors import ConfigError, DataError
from ekfac_dist.influence.queries import QuerySet, parse_query, query_examples, tokenize_queries
from ekfac_dist.models.capture.task_examples import read_examples
from ekfac_dist.models.capture.tasks import CausalLM, Task
from ekfac_dist.models.load.pretrained import context_length


def queries_of(queries: Iterable[Any], tokenizer: Any, model: nn.Module, task: Task) -> QuerySet:
    """Queries from text, if there is a tokenizer, or from examples.

    Warns of each text whose prompt's end splits a token.

    Args:
        queries: Mappings with "prompt" and "completion", or "text"; or examples of the task.
        tokenizer: For text.
        model: The model.
        task: What is asked of it; only a causal language model's queries may be text.

    Raises:
        DataError: There are none, or one is no query.
        ConfigError: They are text, and there is no tokenizer.
    """
    rows = list(queries)
    if not rows:
        raise DataError("There are no queries; give at least one.")
    is_text = any(not (isinstance(row, Mapping) and "input_ids" in row) for row in rows)
    if not is_text or not isinstance(task, CausalLM):
        return query_examples(rows, lambda some: read_examples(task, model, some, None))
    context = context_length(model)
    _require_tokenizer(tokenizer, "queries")
    parsed = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"Query {number} is {type(row).__name__}; give mappings.")
        parsed.append(parse_query(row, f"query {number}", number))
    asked = tokenize_queries(parsed, tokenizer, context)
    for note in asked.split_notes:
        warnings.warn(note, stacklevel=3)
    return asked


def sequences_of(
    train: Iterable[Any], tokenizer: Any, max_tokens: int | None, model: nn.Module, task: Task
) -> Examples:
    """Training sequences from text, if there is a tokenizer, or from examples.

    Warns of texts whose prompts' ends split a token.

    Args:
        train: Mappings with "text" and perhaps "prompt"; or examples of the task.
        tokenizer: For text.
        max_tokens: Longer sequences are cut to this many tokens; None leaves them whole.
        model: The model.
        task: What is asked of it; only a causal language model's sequences may be text.

    Raises:
        DataError: There are none, or one is no text, nor an example.
        ConfigError: They are text, and there is no tokenizer.
    """
    rows = train if hasattr(train, "__getitem__") else list(train)
    first = next(iter(rows), None)
    is_text = isinstance(first, Mapping) and "text" in first and "input_ids" not in first
    if not is_text or not isinstance(task, CausalLM):
        return read_examples(task, model, rows, max_tokens)
    _require_tokenizer(tokenizer, "training sequences")
    prompts = [_text_of(number, row, "prompt") for number, row in enumerate(rows)]
    texts = [_text_of(number, row, "text") for number, row in enumerate(rows)]
    columns = encode(tokenizer, prompts, texts, max_tokens)
    sequences = Sequences(Dataset.from_dict(columns))
    if sequences.counts.split_note:
        warnings.warn(f"Training sequences: {sequences.counts.split_note}", stacklevel=3)
    return sequences


def _text_of(number: int, row: Any, name: str) -> str:
    if not isinstance(row, Mapping) or "text" not in row:
        raise DataError(
            f"Training sequence {number} is {type(row).__name__} without 'text', though the first "
            "one has it; give mappings with 'text', one for each sequence."
        )
    text = row.get(name)
    if text is not None and not isinstance(text, str):
        raise DataError(
            f"Training sequence {number}: {name} is {type(text).__name__}; it must be text, of one "
            "sequence."
        )
    return text or ""


def _require_tokenizer(tokenizer: Any, what: str) -> None:
    if tokenizer is None:
        raise ConfigError(f"The {what} are text, but there is no tokenizer; give tokenizer=….")
