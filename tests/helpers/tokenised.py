"""Sequences of rows in memory, and what they hold."""

import itertools
from typing import Any

from datasets import Dataset

from ekfac_dist.config import DataConfig
from ekfac_dist.data.batches import NO_LABEL
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.data.tokenizing import tokenize
from helpers.workshop import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
fresh = itertools.count()


def sequences_of(
    rows: list[dict[str, Any]], tokenizer: Any = TOKENIZER, name: str | None = None, **fields: Any
) -> Sequences:
    """Tokenises rows; without a name no cache is found."""
    config = DataConfig(source="rows", **fields)
    return tokenize(Dataset.from_list(rows), config, tokenizer, name or f"fresh {next(fresh)}")


def with_prompts(rows: list[tuple[str | None, str | None]], **arguments: Any) -> Sequences:
    named = [{"prompt": prompt, "text": text} for prompt, text in rows]
    return sequences_of(named, prompt="prompt", **arguments)


def tokens(sequences: Sequences, number: int = 0) -> list[int]:
    """A sequence's tokens as they were before inputs and targets were told apart."""
    sequence = sequences[number]
    return [*sequence.inputs.tolist(), int(sequence.targets[-1])]


def labelled(sequences: Sequences, number: int = 0) -> list[int]:
    return [label for label in sequences[number].targets.tolist() if label != NO_LABEL]
