"""What an evaluation reads: sequences with their texts, queries, and which sequences say them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ekfac_dist.config import EvaluateConfig
from ekfac_dist.data.sequences import Sequence as TokenSequence
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.errors import ConfigError, DataError
from ekfac_dist.influence.queries import Query, QuerySet, tokenize_queries
from ekfac_dist.influence.query_texts import read_queries
from ekfac_dist.models.load.pretrained import load_tokenizer
from ekfac_dist.passes.sequences import load_sequences
from ekfac_dist.runtime.processes import World


@dataclass(frozen=True)
class Inputs:
    """The data and queries of an evaluation.

    Attributes:
        tokenizer: The model's tokenizer.
        sequences: The training sequences.
        queries: The tokenised queries.
        gold: The columns of the sequences that say it, for query groups that have any.
    """

    tokenizer: Any
    sequences: Sequences
    queries: QuerySet
    gold: dict[int, list[int]]

    @cached_property
    def in_memory(self) -> list[TokenSequence]:
        """All training sequences in memory, from where they are read again and again."""
        return [self.sequences[k] for k in range(len(self.sequences))]

    def texts(self) -> list[str]:
        """The text of each training sequence, of its tokens."""
        return [
            self.tokenizer.decode([*each.inputs.tolist(), max(int(each.targets[-1]), 0)], True)
            for each in self.in_memory
        ]

    @property
    def query_sequences(self) -> Sequences:
        """The sequence of each query, and then of what contrasts are against."""
        assert isinstance(self.queries.sequences, Sequences)
        return self.queries.sequences

    def query_texts(self) -> list[dict[str, Any]]:
        """The texts of each query group, as they are written into results."""
        texts = self.queries.texts
        assert texts is not None
        groups = zip(self.queries.group_names, self.queries.members, strict=True)
        return [
            {
                "group": name,
                "members": [
                    {
                        "line": texts[query].line,
                        "prompt": texts[query].prompt,
                        "completion": texts[query].completion,
                        "against": texts[query].against,
                    }
                    for query in members
                ],
                "gold": self.gold.get(group, []),
            }
            for group, (name, members) in enumerate(groups)
        ]

    def group_losses(self, losses: np.ndarray) -> np.ndarray:
        """Losses of query groups, from those of the queries' sequences, along the last axis.

        What a contrast is against is subtracted.
        """
        queries = self.queries
        signs = np.array(
            [-1.0 if queries.is_subtracted(k) else 1.0 for k in range(losses.shape[-1])]
        )
        groups = [queries.sequences_of(group) for group in range(len(queries.members))]
        return np.stack([(losses * signs)[..., each].sum(-1) for each in groups], axis=-1)


def read_inputs(config: EvaluateConfig, world: World) -> Inputs:
    """Reads data and queries on every worker.

    Raises:
        UserError: If something cannot be read, or a query has nothing to predict.
    """
    with_weights = config.training.start == "model"
    texts = _read_on_all(config, world)
    tokenizer, fingerprint = world.main_first(
        lambda: load_tokenizer(config.model, with_weights=with_weights)
    )
    with world.agree():
        tokenize_queries(texts, tokenizer, None)  # before the data is tokenised in vain
    sequences = load_sequences(config.data, tokenizer, fingerprint, world)
    with world.agree():
        queries = tokenize_queries(texts, tokenizer, None)
        assert isinstance(queries.sequences, Sequences)
        gold = _read_gold(str(config.queries), texts, queries, sequences)
        if "recall" in config.protocols and not gold:
            raise ConfigError(
                f'protocols has recall, but no query of {config.queries} has a "gold": the index '
                "in the data, from 0, of the sequence that says it, or a list of such."
            )
    return Inputs(tokenizer, sequences, queries, gold)


def _read_on_all(config: EvaluateConfig, world: World) -> list[Query]:
    with world.agree():
        return read_queries(str(config.queries))


def _read_gold(
    path: str, texts: Sequence[Query], queries: QuerySet, sequences: Sequences
) -> dict[int, list[int]]:
    """Columns of the gold sequences of each query group that has any.

    Raises:
        DataError: If a gold index is no whole number, or is not in the data.
    """
    lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    places = sequences.indices if sequences.origins is None else sequences.origins[:, 0]
    gold: dict[int, list[int]] = {}
    for group, members in enumerate(queries.members):
        for query in members:
            value = json.loads(lines[texts[query].line - 1]).get("gold")
            if value is None:
                continue
            for index in value if isinstance(value, list) else [value]:
                if isinstance(index, bool) or not isinstance(index, int):
                    raise DataError(
                        f"{texts[query].where}: gold is {index!r}; give the index in the data, "
                        "from 0, or a list of such."
                    )
                columns = np.flatnonzero(places == index)
                if not len(columns):
                    raise DataError(
                        f"{texts[query].where}: gold is {index}, but the data has no such sequence "
                        f"with a label; it has {len(np.unique(places))}, of index "
                        f"{places.min()} to {places.max()}."
                    )
                gold.setdefault(group, []).extend(columns.tolist())
    return gold
