"""From texts to token sequences: labels behind a prompt, and a cache on disk."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Value
from datasets import List as ListOf

from ekfac_dist.config import DataConfig
from ekfac_dist.data.batches import NO_LABEL
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.errors import DataError

_CACHE_VERSION = "4"
_MAP_ROWS = 256


def require_offsets(tokenizer: Any, what: str) -> None:
    """Refuses a tokenizer that cannot tell a prompt's tokens from those after it.

    Raises:
        DataError: It gives no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{what} is given, but this model's tokenizer ({type(tokenizer).__name__}) does not "
            "tell where in the text its tokens begin; use a model with a fast tokenizer, or no "
            "prompt."
        )


def encode(
    tokenizer: Any, prompts: list[str], texts: list[str], max_tokens: int | None
) -> dict[str, list[Any]]:
    """Token ids, labels and tokens cut off of some texts, each behind its prompt.

    Args:
        tokenizer: A `transformers` tokenizer; it must give offsets if there is any prompt.
        prompts: What comes first and carries no label; may be empty.
        texts: What follows it.
        max_tokens: Longer sequences are cut to this many tokens; None leaves them whole.

    Returns:
        Columns `input_ids`, `labels` (−100 for none), `tokens_cut`, and `split_token`: the text of
        the token that begins in the prompt and ends behind it, so that it carries no label though
        a part of it is the text's; None where there is none, or it was cut off.
    """
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
    columns: dict[str, list[Any]] = {
        "input_ids": [],
        "labels": [],
        "tokens_cut": [],
        "split_token": [],
    }
    for row, ids in enumerate(encoded["input_ids"]):
        labels, split_token = list(ids), None
        limit = len(ids) if max_tokens is None else max_tokens
        if with_prompt:
            special = encoded["special_tokens_mask"][row]
            spaces = [0] * len(ids)
            if trimmed:
                spaces = [_num_spaces(token) for token in tokenizer.convert_ids_to_tokens(ids)]
            spans = _spans(encoded["offset_mapping"][row], special, spaces)
            end = len(prompts[row])
            labels = [
                token if start >= end else NO_LABEL
                for token, (start, _) in zip(ids, spans, strict=True)
            ]
            split = next((span for span in spans[:limit] if span[0] < end < span[1]), None)
            if split is not None:
                split_token = (prompts[row] + texts[row])[slice(*split)]
        columns["input_ids"].append(ids[:limit])
        columns["labels"].append(labels[:limit])
        columns["tokens_cut"].append(max(0, len(ids) - limit))
        columns["split_token"].append(split_token)
    return columns


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
    if config.prompt is not None:
        require_offsets(tokenizer, f"data.prompt ({config.prompt!r})")

    def encode_rows(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [_text(value, config.text) for value in batch[config.text]]
        prompts = [""] * len(texts)
        if config.prompt is not None:
            prompts = [_text(value, config.prompt) for value in batch[config.prompt]]
        out = encode(tokenizer, prompts, texts, config.max_tokens)
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
            "split_token": Value("string"),
        }
    )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        encoded = rows.map(
            encode_rows,
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


def _trims_offsets(tokenizer: Any) -> bool:
    """Whether the tokenizer's tokens hold the space before them, but its offsets leave it out.

    So it is with byte-level tokenizers whose post-processor trims offsets, GPT-NeoX's among them.
    """
    step = json.loads(tokenizer.backend_tokenizer.to_str()).get("post_processor") or {}
    return any(part.get("trim_offsets") for part in step.get("processors", [step]))


def _num_spaces(token: str) -> int:
    """Spaces at the front of a byte-level token, in which a space is written Ġ."""
    return len(token) - len(token.lstrip("Ġ"))


def _spans(
    offsets: Iterable[tuple[int, int]], special: Iterable[int], spaces: Iterable[int]
) -> list[tuple[int, int]]:
    """Where in the text each token begins and ends; a special token, where the one before it ended.

    Args:
        offsets: Where the tokenizer says that each token begins and ends.
        special: Whether each is a special token.
        spaces: How many spaces of each token its offsets leave out at its front.
    """
    spans, last_end = [], 0
    for (start, end), is_special, num_spaces in zip(offsets, special, spaces, strict=True):
        if is_special:
            spans.append((last_end, last_end))
            continue
        begin = max(0, start - num_spaces)  # at the text's start nothing was left out
        last_end = max(end, begin + num_spaces)
        spans.append((begin, last_end))
    return spans
