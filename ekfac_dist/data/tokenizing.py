"""From texts to token sequences, cached on disk; a prompt's tokens carry no label.

Knows the tokenizer, but no model.
"""

import dataclasses
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
from ekfac_dist.config.checks import template_columns
from ekfac_dist.data.batches import NO_LABEL
from ekfac_dist.data.chats import messages_of, rendered, require_template
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.data.token_columns import documents_of
from ekfac_dist.data.windows import in_parts
from ekfac_dist.errors import DataError

_CACHE_VERSION = "5"
_MAP_BATCH = 256  # examples tokenised at a time
_FEATURES = Features(
    {
        "input_ids": ListOf(Value("int32")),
        "labels": ListOf(Value("int32")),
        "tokens_cut": Value("int64"),
        "split_token": Value("string"),
        "document": Value("int64"),
        "first_token": Value("int64"),
    }
)


def require_offsets(tokenizer: Any, field: str) -> None:
    """Refuses a tokenizer that gives no character offsets of its tokens.

    Without them a prompt's tokens cannot be distinguished from those after it.

    Args:
        tokenizer: A `transformers` tokenizer.
        field: What needs the offsets, for the error.

    Raises:
        DataError: If the tokenizer gives no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{field} is given, but this model's tokenizer ({type(tokenizer).__name__}) does not "
            "tell where in the text its tokens begin; use a model with a fast tokenizer, or no "
            "prompt."
        )


def encode(
    tokenizer: Any,
    prompts: list[str],
    texts: list[str],
    max_tokens: int | None,
    *,
    add_special_tokens: bool = True,
) -> dict[str, list[Any]]:
    """Tokenises texts, each after its prompt.

    Args:
        tokenizer: A `transformers` tokenizer; it must give offsets if there is any prompt.
        prompts: Beginning of each example, which carries no label; may be empty.
        texts: The text that follows each prompt.
        max_tokens: Longer sequences are cut to this many tokens; None leaves them whole.
        add_special_tokens: Whether the tokenizer adds special tokens, as it does by default; a chat
            template writes them itself.

    Returns:
        Columns `input_ids`, `labels` (−100 for none), `tokens_cut` (number of tokens removed), and
        `split_token`: the text of a token that begins in the prompt and ends after it, so that it
        carries no label although it includes characters of the text; None where there is no such
        token, or it was cut off.
    """
    with_prompt = any(prompts)
    encoded = tokenizer(
        [prompt + text for prompt, text in zip(prompts, texts, strict=True)],
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=with_prompt,
        return_special_tokens_mask=with_prompt,
        verbose=False,
    )
    trims_offsets = with_prompt and _trims_offsets(tokenizer)
    columns: dict[str, list[Any]] = {
        "input_ids": [],
        "labels": [],
        "tokens_cut": [],
        "split_token": [],
    }
    for k, ids in enumerate(encoded["input_ids"]):
        labels, split_token = list(ids), None
        limit = len(ids) if max_tokens is None else max_tokens
        if with_prompt:
            special_tokens = encoded["special_tokens_mask"][k]
            trimmed_spaces = [0] * len(ids)
            if trims_offsets:
                trimmed_spaces = [
                    _leading_spaces(token) for token in tokenizer.convert_ids_to_tokens(ids)
                ]
            spans = _token_spans(encoded["offset_mapping"][k], special_tokens, trimmed_spaces)
            prompt_end = len(prompts[k])
            labels = [
                token if start >= prompt_end else NO_LABEL
                for token, (start, _) in zip(ids, spans, strict=True)
            ]
            split_span = next(
                (span for span in spans[:limit] if span[0] < prompt_end < span[1]), None
            )
            if split_span is not None:
                split_token = (prompts[k] + texts[k])[slice(*split_span)]
        columns["input_ids"].append(ids[:limit])
        columns["labels"].append(labels[:limit])
        columns["tokens_cut"].append(max(0, len(ids) - limit))
        columns["split_token"].append(split_token)
    return columns


def tokenize(
    examples: Dataset,
    config: DataConfig,
    tokenizer: Any,
    tokenizer_fingerprint: str,
    on_examples: Callable[[int], None] = lambda num: None,
) -> Sequences:
    """Tokenises a source's examples, and cuts them or takes windows; the result is cached on disk.

    A prompt and the text after it are tokenised together; tokens that begin after the prompt's end
    carry the labels. Of a chat, the last turn's tokens do. Data that is tokenised already is only
    checked.

    Args:
        examples: The source's examples.
        config: Columns and the token limit.
        tokenizer: A `transformers` tokenizer; None will do for data that is tokenised already.
        tokenizer_fingerprint: Identifies the tokenizer in the cache.
        on_examples: Called with the number of examples just tokenised.

    Raises:
        DataError: If a value is no text; if there is a prompt column but the tokenizer gives no
            offsets; if the cache cannot be written; or if no sequence has a label.
    """
    if config.prompt is not None:
        require_offsets(tokenizer, f"data.prompt ({config.prompt!r})")

    if config.messages is not None:
        require_template(tokenizer, f"data.messages ({config.messages!r})")
        require_offsets(tokenizer, f"data.messages ({config.messages!r})")

    def encode_examples(
        columns: Mapping[str, list[Any]], indices: list[int]
    ) -> dict[str, list[Any]]:
        documents = _documents(columns, indices, config, tokenizer)
        on_examples(len(indices))
        return in_parts(documents, config.max_tokens, config.window)

    cache = cache_directory()
    cache_name = _cache_name(examples, config, tokenizer_fingerprint)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        encoded = examples.map(
            encode_examples,
            batched=True,
            with_indices=True,
            batch_size=_MAP_BATCH,
            remove_columns=examples.column_names,
            features=_FEATURES,
            cache_file_name=str(cache / f"{cache_name}.arrow"),
            new_fingerprint=cache_name,
            load_from_cache_file=True,
        )
    except OSError as error:
        raise DataError(
            f"The tokenised data cannot be cached under {cache}: {error.strerror or error}; set "
            "HF_HOME to a directory that can be written."
        ) from error
    return Sequences(encoded)


def _cache_name(examples: Dataset, config: DataConfig, tokenizer_fingerprint: str) -> str:
    """Name in the cache: a hash of everything that the tokenised data depends on."""
    key = "|".join(
        [
            _CACHE_VERSION,
            examples._fingerprint,
            tokenizer_fingerprint,
            repr(_tokenising_settings(config)),
        ]
    )
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def _tokenising_settings(config: DataConfig) -> dict[str, Any]:
    """The settings that tokens and labels depend on."""
    others = ("source", "subset", "split", "max_sequences")
    settings = dataclasses.asdict(config)
    return {name: value for name, value in settings.items() if name not in others}


def _documents(
    columns: Mapping[str, list[Any]], indices: list[int], config: DataConfig, tokenizer: Any
) -> dict[str, list[Any]]:
    """The documents of some examples, with the columns of `windows.COLUMNS`.

    Args:
        columns: The examples' columns.
        indices: The examples' indices in the source.
        config: What the columns hold.
        tokenizer: The tokenizer; not used for data that is tokenised already.
    """
    if config.tokens is not None:
        return documents_of(columns, indices, config)
    if config.messages is not None:
        chats = zip(columns[config.messages], indices, strict=True)
        pairs = [_chat(messages, tokenizer, f"row {index} (from 0)") for messages, index in chats]
    else:
        pairs = list(zip(*_prompts_and_texts(columns, config), strict=True))
    encoded = encode(
        tokenizer,
        [prompt for prompt, _ in pairs],
        [text for _, text in pairs],
        config.max_tokens if config.window is None else None,
        add_special_tokens=config.messages is None,
    )
    return {**encoded, "document": indices, "first_token": [0] * len(indices)}


def _chat(messages: Any, tokenizer: Any, where: str) -> tuple[str, str]:
    return rendered(messages_of(messages, where), tokenizer, where)


def _prompts_and_texts(
    columns: Mapping[str, list[Any]], config: DataConfig
) -> tuple[list[str], list[str]]:
    """Prompt, "" where there is none, and text of each example."""
    cells = {
        name: [_require_text(value, name) for value in columns[name]] for name in config.columns
    }
    texts = cells.get(config.text, [])
    if config.template is not None:
        names = list(dict.fromkeys(template_columns(config.template)))
        rows = zip(*(cells[name] for name in names), strict=True)
        texts = [config.template.format(**dict(zip(names, row, strict=True))) for row in rows]
    prompts = [""] * len(texts) if config.prompt is None else cells[config.prompt]
    return prompts, texts


def text_of(example: Mapping[str, Any], config: DataConfig) -> str | None:
    """Prompt and text of an example together; None where its text is not in its columns."""
    if config.tokens is not None or config.messages is not None:
        return None
    columns = {name: [example[name]] for name in config.columns}
    (prompt,), (text,) = _prompts_and_texts(columns, config)
    return f"{prompt}{text}"


def cache_directory() -> Path:
    """Folder of the cached data: inside the `datasets` library's own cache."""
    return Path(os.path.expanduser(str(datasets.config.HF_DATASETS_CACHE))) / "ekfac_dist"


def _require_text(value: object, column: str) -> str:
    """A cell's text; "" for a missing value."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"Column {column!r} holds {value!r} ({type(value).__name__}); it must hold text."
        )
    return value


def _trims_offsets(tokenizer: Any) -> bool:
    """Whether the tokenizer's offsets leave out the space that its tokens begin with.

    That is so for byte-level tokenizers whose post-processor trims offsets, such as GPT-NeoX's.
    """
    post_processor = tokenizer.backend_tokenizer.post_processor
    if post_processor is None:
        return False
    # Its own state; that of the whole tokenizer, with the vocabulary, takes a tenth of a second.
    state = json.loads(post_processor.__getstate__())
    return any(processor.get("trim_offsets") for processor in state.get("processors", [state]))


def _leading_spaces(token: str) -> int:
    """Leading spaces of a byte-level token, which writes a space as Ġ."""
    return len(token) - len(token.lstrip("Ġ"))


def _token_spans(
    offsets: Iterable[tuple[int, int]], special: Iterable[int], spaces: Iterable[int]
) -> list[tuple[int, int]]:
    """Beginning and end of each token in the text, in characters.

    A special token has an empty span where the token before it ended.

    Args:
        offsets: Beginning and end of each token as the tokenizer gives them.
        special: Whether each token is a special one.
        spaces: Leading spaces of each token that its offsets leave out.
    """
    spans, last_end = [], 0
    for (start, end), is_special, num_spaces in zip(offsets, special, spaces, strict=True):
        if is_special:
            spans.append((last_end, last_end))
            continue
        begin = max(0, start - num_spaces)  # no space is trimmed at the text's beginning
        last_end = max(end, begin + num_spaces)
        spans.append((begin, last_end))
    return spans
