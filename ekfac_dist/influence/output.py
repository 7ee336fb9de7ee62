"""Writes the scores of one run of `query`: the lines and tensors of each file of its results.

`results` describes the files, `answer` makes the manifest.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ekfac_dist.config import DataConfig
from ekfac_dist.data.batches import NO_LABEL
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.data.tokenizing import text_of
from ekfac_dist.influence import results
from ekfac_dist.influence.answer import Answer, results_manifest
from ekfac_dist.influence.results import ResultsSink
from ekfac_dist.influence.scores import Details, InfluenceScores, Listed
from ekfac_dist.influence.token_texts import TokenTexts


def write_answer(writer: ResultsSink, answer: Answer, examples: Dataset) -> None:
    """Writes complete results.

    Args:
        writer: Takes the files.
        answer: The scores, and what they were computed from.
        examples: The examples of the training data, for their texts.

    Raises:
        OutputError: If a file cannot be written.
    """
    scores = answer.scores
    writer.lines(results.QUERIES, _lines_of_queries(answer))
    writer.tensors(results.SCORES, _score_tensors(scores))
    texts = SequenceTexts(answer.scored, examples, answer.data, answer.tokenizer)
    writer.lines(results.TOP, _lines_of_lists(scores, scores.top, texts))
    writer.lines(results.BOTTOM, _lines_of_lists(scores, scores.bottom, texts))
    if scores.details is not None:
        writer.tensors(results.DETAILS, _detail_tensors(scores.details, scores.indices))
    lists = [*scores.top, *scores.bottom]
    columns = np.unique(np.concatenate([listed.columns for listed in lists]))
    writer.lines(results.SEQUENCES, (texts.line(int(column)) for column in columns))
    writer.finish(results_manifest(answer))


def _score_tensors(scores: InfluenceScores) -> dict[str, Tensor]:
    tensors = {
        "scores": scores.scores.float(),
        "indices": torch.from_numpy(scores.indices),
    }
    if scores.normalize != "none":
        tensors |= {"norms": scores.norms.float(), "query_norms": scores.query_norms.float()}
    for name in ("module_scores", "layer_scores", "self_influence", "token_scores"):
        values = getattr(scores, name)
        if values is not None:
            tensors[name] = values.float()
    if scores.token_offsets is not None:
        tensors["token_offsets"] = torch.from_numpy(scores.token_offsets)
    if scores.rescored:
        lengths = torch.tensor([len(rescored.columns) for rescored in scores.rescored])
        columns = np.concatenate([rescored.columns for rescored in scores.rescored])
        tensors |= {
            "exact_query": torch.arange(len(lengths)).repeat_interleave(lengths),
            "exact_index": torch.from_numpy(scores.indices[columns]),
            "exact_scores": torch.cat([r.exact_scores for r in scores.rescored]).float(),
            "scan_scores": torch.cat([r.scan_scores for r in scores.rescored]).float(),
        }
    return tensors


def _detail_tensors(details: Details, indices: np.ndarray) -> dict[str, Tensor]:
    """Tensors of the file of details; `indices` are those in the data of all scored sequences."""
    return {
        "pair_query": torch.from_numpy(details.rows),
        "pair_index": torch.from_numpy(indices[details.columns]),
        "offsets": torch.from_numpy(details.offsets),
        "token_scores": details.token_scores.float(),
        "layer_token_scores": details.layer_token_scores.float(),
        "module_scores": details.module_scores.float(),
    }


def _lines_of_queries(answer: Answer) -> Iterator[dict[str, Any]]:
    """The line of each query group."""
    texts, sequences = answer.queries.texts, answer.queries.sequences
    tokens = TokenTexts(answer.tokenizer)
    assert texts is not None
    assert isinstance(sequences, Sequences)

    def side(number: int) -> dict[str, Any]:
        """The tokens of one of the queries' sequences."""
        ids, is_label = _tokens_and_labels(sequences[number].inputs, sequences[number].targets)
        return {
            "tokens": tokens.of(ids),
            "is_label": is_label,
            "split_token": answer.queries.split_tokens[number],
        }

    for group, (queries, name) in enumerate(
        zip(answer.queries.members, answer.queries.group_names, strict=True)
    ):
        members = []
        for query in queries:
            member = {
                "line": texts[query].line,
                "prompt": texts[query].prompt,
                "completion": texts[query].completion,
                **side(query),
                "nats": answer.scores.query_losses[query],
            }
            if (other := answer.queries.against[query]) is not None:
                member["against"] = {
                    "completion": texts[query].against,
                    **side(other),
                    "nats": answer.scores.against_losses[query],
                }
            members.append(member)
        yield {"query": group, "group": name, "members": members}


def _tokens_and_labels(inputs: np.ndarray, targets: np.ndarray) -> tuple[list[int], list[bool]]:
    """The T + 1 tokens of a sequence of T positions, and whether each is a label."""
    ids = [*inputs.tolist(), int(targets[-1])]
    return ids, [False, *(targets != NO_LABEL).tolist()]


class SequenceTexts:
    """Texts and tokens of the scored sequences, by column.

    Args:
        scored: The sequences.
        examples: The examples of the training data.
        data: Source of the training data.
        tokenizer: The model's tokenizer.
    """

    def __init__(
        self, scored: Sequences, examples: Dataset, data: DataConfig, tokenizer: Any
    ) -> None:
        self._scored, self._examples, self._data = scored, examples, data
        self._tokens = TokenTexts(tokenizer)

    def text(self, column: int) -> str:
        """Prompt and text together, as they were tokenised; of a part of a row, its tokens'."""
        scored = self._scored
        text = None
        if scored.origins is None:
            example = self._examples[int(scored.indices[column])]
            text = text_of(example, self._data)
        if text is None:
            ids, _ = _tokens_and_labels(scored[column].inputs, scored[column].targets)
            text = "".join(self._tokens.of(ids))
        return text

    def origin(self, column: int) -> dict[str, int]:
        """The row in the source that a sequence is a part of, and the first of its tokens there."""
        origins = self._scored.origins
        if origins is None:
            return {}
        document, first_token = origins[column].tolist()
        return {"document": document, "first_token": first_token}

    def line(self, column: int) -> dict[str, Any]:
        """The line of one sequence in the file of sequences."""
        sequence = self._scored[column]
        ids, is_label = _tokens_and_labels(sequence.inputs, sequence.targets)
        return {
            "index": sequence.index,
            **self.origin(column),
            "text": self.text(column),
            "tokens": self._tokens.of(ids),
            "is_label": is_label,
        }


def _lines_of_lists(
    scores: InfluenceScores, lists: list[Listed], texts: SequenceTexts
) -> Iterator[dict[str, Any]]:
    """The line of each listed sequence of each query group, for one of both ends."""
    gains = scores.gains
    for group, listed in enumerate(lists):
        shares = scores.in_shares(listed.scores, group).tolist()
        nats = scores.in_nats(listed.scores, group, listed.columns)
        for rank, column in enumerate(listed.columns.tolist(), start=1):
            share = shares[rank - 1]
            line = {
                "query": group,
                "rank": rank,
                "index": int(scores.indices[column]),
                **texts.origin(column),
                "score": float(listed.scores[rank - 1]),
                "share": None if math.isnan(share) else share,
                "nats": None if nats is None else float(nats[rank - 1]),
                "text": texts.text(column),
            }
            if scores.rescored:
                line["scan_score"] = float(scores.scores[group, column])
            if nats is not None and nats[rank - 1] > gains[group]:
                line["note"] = _note_beyond_loss(gains[group])
            yield line


def _note_beyond_loss(loss: float) -> str:
    """The note of a value in nats that is impossible, being above −log p of its query group."""
    return (
        f"above the query's −log p, {loss:.3g} nats, which is all that it can gain: too far for "
        "first order"
    )
