"""Turns requests into the questions that they ask; what a request cannot be is refused.

Each refusal is a sentence. What the fields of a request may hold by themselves, `models` says.
"""

import dataclasses
import math
from typing import Any

from ekfac_dist.config import (
    DEFAULT_TOP_K,
    DampingConfig,
    RefineConfig,
    ScoresConfig,
    ServeConfig,
    require_refinable,
)
from ekfac_dist.errors import ConfigError, DataError
from ekfac_dist.influence.asking import Question
from ekfac_dist.influence.query_texts import parse_query
from ekfac_dist.serve.jobs import Continuation
from ekfac_dist.serve.models import CompletionRequest, DampingRequest, QuestionRequest

MOST_DEPTH = 10
LEAST_TEMPERATURE = 0.01  # by less, logits overflow
_WHERE = "The question"


def question_of(
    request: QuestionRequest, config: ServeConfig, num_sequences: int
) -> tuple[Question, dict[str, Any]]:
    """The question that a request asks, and the request with every default filled in.

    Args:
        request: The request.
        config: The service's limits and default damping.
        num_sequences: Number of sequences in the index.

    Raises:
        ConfigError: If a setting is not one that this service answers.
        DataError: If its texts are no question.
    """
    fields = {
        "prompt": request.prompt,
        "completion": request.completion,
        "against": request.against,
        "messages": request.messages,
    }
    if request.messages is not None:
        if request.prompt or request.completion is not None:
            raise DataError(f"{_WHERE} has messages and a prompt or completion; give one of them.")
        del fields["prompt"]
    elif request.completion is None:
        raise DataError(
            f"{_WHERE} has no completion, so nothing to explain; give one, or messages."
        )
    _require_short(fields, config)
    query = parse_query(fields, _WHERE, 0)
    top_k, bottom_k, rescore = _lengths(request, config, num_sequences)
    refine = RefineConfig(**(request.refine.model_dump() if request.refine else {}))
    require_refinable(ScoresConfig(normalize=request.normalise), refine)
    question = Question(
        query=query,
        top_k=top_k,
        bottom_k=bottom_k,
        rescore=rescore,
        damping=_damping(request, config.damping),
        normalize=request.normalise,
        tokens=request.tokens,
        refine=refine,
    )
    shown = request.model_dump() | {
        "top_k": top_k,
        "bottom_k": bottom_k,
        "rescore": rescore,
        "damping": dataclasses.asdict(question.damping),
        "refine": dataclasses.asdict(refine) if refine.is_on else None,
    }
    return question, shown


def continuation_of(request: CompletionRequest, config: ServeConfig) -> Continuation:
    """What the model is to go on from.

    Args:
        request: The request.
        config: The service's limits.

    Raises:
        ConfigError: If more is asked for than this service gives.
        DataError: If there is no text, or two.
    """
    if request.messages is not None and request.prompt:
        raise DataError("There are messages and a prompt; give one of them.")
    if not request.messages and not request.prompt:
        raise DataError("There is no prompt, so nothing to go on from; give one, or messages.")
    _require_short({"prompt": request.prompt, "messages": request.messages}, config)
    _require_at_most("max_tokens", request.max_tokens, config.max_completion_tokens)
    if 0 < request.temperature < LEAST_TEMPERATURE:
        raise ConfigError(
            f"temperature is {request.temperature:g}; give 0, for the likeliest token each time, "
            f"or {LEAST_TEMPERATURE} or more."
        )
    return Continuation(
        request.prompt, request.messages, request.max_tokens, request.temperature, request.seed
    )


def _lengths(
    request: QuestionRequest, config: ServeConfig, num_sequences: int
) -> tuple[int, int, int]:
    """Lengths of both lists, and how many sequences are scored exactly at either end."""
    top_k = request.top_k
    if top_k is None:
        top_k = min(DEFAULT_TOP_K, config.max_top_k, num_sequences)
    bottom_k = top_k if request.bottom_k is None else request.bottom_k
    longest = max(top_k, bottom_k)
    rescore = longest if request.rescore is None else request.rescore
    for name, value in (("top_k", top_k), ("bottom_k", bottom_k), ("rescore", rescore)):
        _require_at_most(name, value, config.max_top_k)
        if value > num_sequences:
            raise ConfigError(
                f"{name} is {value}, but the index has {num_sequences} sequences; give "
                f"{num_sequences} or less."
            )
    if 0 < rescore < longest:
        raise ConfigError(
            f"rescore is {rescore}, but lists of {longest} are asked for; score at least as many "
            "exactly, or none (0)."
        )
    return top_k, bottom_k, rescore


def _damping(request: QuestionRequest, default: DampingConfig) -> DampingConfig:
    given = request.damping
    if given is None:
        return default
    if isinstance(given, DampingRequest):
        return DampingConfig(**given.model_dump())
    if given < 0:
        raise ConfigError(f"damping is {given}; it must be a number of 0 or more.")
    return DampingConfig(value=given)


def _require_at_most(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise ConfigError(f"{name} is {value}; this service gives {limit} at most.")


def _require_short(fields: dict[str, Any], config: ServeConfig) -> None:
    """Refuses texts that are longer together than this service takes, or no text at all."""
    length = sum(_num_characters(value) for value in fields.values())
    if length > config.max_prompt_characters:
        raise DataError(
            f"The texts have {length} characters together; this service takes "
            f"{config.max_prompt_characters} at most: shorten them."
        )


def _num_characters(value: Any, depth: int = 0) -> int:
    """Characters of all texts in a value of JSON.

    Raises:
        DataError: If one of them cannot be encoded, a number is not finite, or fields are nested
            too deep.
    """
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise DataError("A text holds half of a surrogate pair; give whole characters.")
        return len(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"A message holds {value}; give finite numbers.")
    if depth > MOST_DEPTH:
        raise DataError("The messages are nested too deep; give each a role and a content.")
    if isinstance(value, list):
        return sum(_num_characters(item, depth + 1) for item in value)
    if isinstance(value, dict):
        return sum(_num_characters([*pair], depth) for pair in value.items())
    return 0
