"""Token sequences with labels: what every pass reads.

A sequence of tokens x_0 … x_{T-1} becomes inputs x_0 … x_{L-1} and targets x_1 … x_L, where x_L is
its last labelled token. So every kept position is a counted one: a later loss term depends on it.
A target is −100 where its token carries no label (a prompt's). A sequence without any label is left
out and counted. `index` is always the row in the source, whatever was left out before it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, Value
from datasets import List as ListOf

from ekfac_dist.config import DataConfig
from ekfac_dist.errors import DataError

NO_LABEL = -100
_CACHE_VERSION = "3"
_MAP_ROWS = 256


@dataclass(frozen=True)
class Sequence:
    """One sequence, ready for a batch.

    Attributes:
        index: Row in the source.
        inputs: Token ids [L], int32 or int64.
        targets: Token ids [L] to predict at each position, −100 where there is no label.
    """

    index: int
    inputs: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Counts:
    """What became of the source's rows.

    Attributes:
        rows: Rows in the source.
        unlabelled: Rows left out because no token of theirs carries a label.
        truncated: Sequences cut to the token limit.
        tokens_cut: Tokens that the cut took away.
    """

    rows: int
    unlabelled: int
    truncated: int
    tokens_cut: int


class Sequences:
    """All sequences of a data set that have a label, readable by number, memory-mapped.

    Args:
        rows: Columns `input_ids` and `labels` (one entry per token, −100 for none) and
            `tokens_cut` (int).

    Attributes:
        indices: Row in the source of each kept sequence [N].
        num_positions: Counted positions of each kept sequence [N].
        num_labels: Labels of each kept sequence [N].
        counts: What became of the source's rows.
        max_tokens: Length of the longest row.
        max_id: The largest token id, of labels too.

    Raises:
        DataError: No sequence is left.
    """

    def __init__(self, rows: Dataset) -> None:
        positions = np.zeros(len(rows), dtype=np.int64)
        num_labels = np.zeros(len(rows), dtype=np.int64)
        digest = hashlib.sha256()
        self.max_id = self.max_tokens = 0
        view = rows.with_format("numpy", columns=["input_ids", "labels"])
        for start in range(0, len(rows), 1024):
            part = view[start : start + 1024]
            for offset, (ids, labels) in enumerate(
                zip(part["input_ids"], part["labels"], strict=True)
            ):
                self.max_tokens = max(self.max_tokens, len(ids))
                largest = max(np.max(ids, initial=0), np.max(labels[1:], initial=0))
                self.max_id = max(self.max_id, int(largest))
                labelled = np.flatnonzero(np.asarray(labels)[1:] != NO_LABEL)
                if labelled.size:
                    positions[start + offset] = labelled[-1] + 1
                    num_labels[start + offset] = labelled.size
                for array in (ids, labels):
                    digest.update(np.asarray(array, dtype="<i8").tobytes())
                    digest.update(b"|")
        kept = np.flatnonzero(positions)
        cut = np.asarray(rows["tokens_cut"], dtype=np.int64)
        self.counts = Counts(
            rows=len(rows),
            unlabelled=int(len(rows) - kept.size),
            truncated=int((cut > 0).sum()),
            tokens_cut=int(cut.sum()),
        )
        if not kept.size:
            raise DataError(
                f"None of the {len(rows)} sequences has a label: each is empty, of one token, or "
                "all prompt."
            )
        self._rows = view
        self._digest = digest.hexdigest()
        self.indices = kept
        self.num_positions = positions[kept]
        self.num_labels = num_labels[kept]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> Sequence:
        index = int(self.indices[number])
        length = int(self.num_positions[number])
        row = self._rows[index]
        labels = np.asarray(row["labels"])[1 : length + 1]
        return Sequence(index, np.asarray(row["input_ids"])[:length], labels)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every row's token ids and labels, in order."""
        return self._digest


def tokenize(
    rows: Dataset,
    config: DataConfig,
    tokenizer: Any,
    tokenizer_fingerprint: str,
    on_rows: Callable[[int], None] = lambda num: None,
) -> Sequences:
    """Tokenises a source's rows; the result is cached on disk.

    A prompt and the text after it are tokenised together; tokens that begin after the prompt's end
    carry the labels.

    Args:
        rows: The source's rows.
        config: Columns and the token limit.
        tokenizer: A `transformers` tokenizer.
        tokenizer_fingerprint: What identifies the tokenizer, for the cache.
        on_rows: Called with the number of rows just tokenised.

    Raises:
        DataError: A row is no text; a prompt is asked for but the tokenizer gives no offsets; or
            no sequence has a label.
    """
    if config.prompt is not None and not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"data.prompt is {config.prompt!r}, but this model's tokenizer "
            f"({type(tokenizer).__name__}) does not tell where in the text its tokens begin; use "
            "a model with a fast tokenizer, or no prompt column."
        )

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [_text(value, config.text) for value in batch[config.text]]
        prompts = [""] * len(texts)
        if config.prompt is not None:
            prompts = [_text(value, config.prompt) for value in batch[config.prompt]]
        out = _encode(tokenizer, prompts, texts, config.max_tokens)
        on_rows(len(texts))
        return out

    key = "|".join(
        [
            _CACHE_VERSION,
            rows._fingerprint,
            tokenizer_fingerprint,
            repr((config.text, config.prompt, config.max_tokens)),
        ]
    )
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    cache = cache_directory()
    features = Features(
        {
            "input_ids": ListOf(Value("int32")),
            "labels": ListOf(Value("int32")),
            "tokens_cut": Value("int64"),
        }
    )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        encoded = rows.map(
            encode,
            batched=True,
            batch_size=_MAP_ROWS,
            remove_columns=rows.column_names,
            features=features,
            cache_file_name=str(cache / f"{name}.arrow"),
            new_fingerprint=name,
            load_from_cache_file=True,
        )
    except OSError as error:
        raise DataError(
            f"The tokenised data cannot be cached under {cache}: {error.strerror or error}; set "
            "HF_HOME to a directory that can be written."
        ) from error
    return Sequences(encoded)


def cache_directory() -> Path:
    """Where tokenised data is kept: beside the `datasets` library's own cache."""
    return Path(os.path.expanduser(str(datasets.config.HF_DATASETS_CACHE))) / "ekfac_dist"


def _text(value: object, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"Column {column!r} holds {value!r} ({type(value).__name__}); it must hold text."
        )
    return value


def _encode(
    tokenizer: Any, prompts: list[str], texts: list[str], max_tokens: int
) -> dict[str, list[Any]]:
    with_prompt = any(prompts)
    encoded = tokenizer(
        [prompt + text for prompt, text in zip(prompts, texts, strict=True)],
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=with_prompt,
        return_special_tokens_mask=with_prompt,
        verbose=False,
    )
    trimmed = with_prompt and _trims_offsets(tokenizer)
    all_ids, all_labels, all_cut = [], [], []
    for row, ids in enumerate(encoded["input_ids"]):
        labels = list(ids)
        if with_prompt:
            special = encoded["special_tokens_mask"][row]
            spaces = [0] * len(ids)
            if trimmed:
                spaces = [_num_spaces(token) for token in tokenizer.convert_ids_to_tokens(ids)]
            starts = _starts(encoded["offset_mapping"][row], special, spaces)
            end = len(prompts[row])
            labels = [
                token if start >= end else NO_LABEL
                for token, start in zip(ids, starts, strict=True)
            ]
        all_ids.append(ids[:max_tokens])
        all_labels.append(labels[:max_tokens])
        all_cut.append(max(0, len(ids) - max_tokens))
    return {"input_ids": all_ids, "labels": all_labels, "tokens_cut": all_cut}


def _trims_offsets(tokenizer: Any) -> bool:
    """Whether the tokenizer's tokens hold the space before them, but its offsets leave it out.

    So it is with byte-level tokenizers whose post-processor trims offsets, GPT-NeoX's among them.
    """
    step = json.loads(tokenizer.backend_tokenizer.to_str()).get("post_processor") or {}
    return any(part.get("trim_offsets") for part in step.get("processors", [step]))


def _num_spaces(token: str) -> int:
    """Spaces at the front of a byte-level token, in which a space is written Ġ."""
    return len(token) - len(token.lstrip("Ġ"))


def _starts(
    offsets: Iterable[tuple[int, int]], special: Iterable[int], spaces: Iterable[int]
) -> list[int]:
    """Where in the text each token begins; a special token begins where the one before it ended.

    Args:
        offsets: Where the tokenizer says that each token begins and ends.
        special: Whether each is a special token.
        spaces: How many spaces of each token its offsets leave out at its front.
    """
    starts, last_end = [], 0
    for (start, end), is_special, num_spaces in zip(offsets, special, spaces, strict=True):
        if is_special:
            starts.append(last_end)
            continue
        begin = max(0, start - num_spaces)  # at the text's start nothing was left out
        starts.append(begin)
        last_end = max(end, begin + num_spaces)
    return starts


def from_examples(data: Any, max_tokens: int | None = None) -> Sequences:
    """Sequences from data that is tokenised already.

    Args:
        data: A `datasets.Dataset`, or any iterable of examples or batches (a `DataLoader`, a list):
            each a mapping with `input_ids` and, if wanted, `labels` (−100 for none; by default
            every token) and `attention_mask` (0 for padding, on either side). Padding is taken off
            here, whatever ids it has. Every worker must give the whole data, the same.
        max_tokens: Longer sequences are cut to this many tokens.

    Raises:
        DataError: No example; one without `input_ids`, or of inconsistent lengths; or something
            that is no token id.
    """
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "tokens_cut": []}
    for example in data:
        if not isinstance(example, Mapping) or "input_ids" not in example:
            raise DataError(
                f"The data holds a {type(example).__name__} without 'input_ids'; give mappings "
                "with 'input_ids' and, if wanted, 'attention_mask' and 'labels'."
            )
        ids = _rows(example, "input_ids")
        labels = _rows(example, "labels") if example.get("labels") is not None else ids
        masked = example.get("attention_mask") is not None
        masks = _rows(example, "attention_mask") if masked else [np.ones_like(row) for row in ids]
        if not [len(row) for row in ids] == [len(row) for row in labels] == [len(m) for m in masks]:
            raise DataError(
                "An example's input_ids, labels and attention_mask have different lengths: "
                f"{[len(row) for row in ids]}, {[len(row) for row in labels]} and "
                f"{[len(row) for row in masks]}."
            )
        for row, label, mask in zip(ids, labels, masks, strict=True):
            real = mask.astype(bool)
            row, label = row[real], label[real]
            if np.min(row, initial=0) < 0 or np.min(label[label != NO_LABEL], initial=0) < 0:
                raise DataError(
                    "An example holds a token id below 0; ids are 0 or more, and a label that is "
                    f"none is {NO_LABEL}."
                )
            limit = len(row) if max_tokens is None else max_tokens
            columns["input_ids"].append(row[:limit])
            columns["labels"].append(label[:limit])
            columns["tokens_cut"].append(max(0, len(row) - limit))
    if not columns["input_ids"]:
        raise DataError("The data has no sequences.")
    return Sequences(Dataset.from_dict(columns))


def _rows(example: Mapping[str, Any], column: str) -> list[np.ndarray]:
    """One array per sequence, of an example (one dimension) or a batch (two)."""
    value = _as_array(example[column])
    if isinstance(value, np.ndarray):
        rows = list(value) if value.ndim == 2 else [value]
    elif isinstance(value, (list, tuple)) and value and np.ndim(value[0]):
        rows = [np.asarray(_as_array(row)) for row in value]  # lengths may differ
    else:
        rows = [np.asarray(value)]
    if any(row.ndim != 1 or (row.size and row.dtype.kind not in "iub") for row in rows):
        raise DataError(
            f"An example's {column} is no sequence of whole numbers, nor a batch of them; give a "
            "tensor, an array or a list."
        )
    return [row.astype(np.int64) for row in rows]


def _as_array(value: Any) -> Any:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value
