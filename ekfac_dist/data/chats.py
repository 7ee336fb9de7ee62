"""Chats: a list of messages, as text by the tokenizer's own template.

The labels of a chat are what its last turn, the assistant's, adds: the text of all messages less
the text with which the template asks for an answer to those before it. Knows the tokenizer, but no
model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from ekfac_dist.errors import DataError, first_line

Messages = Sequence[Mapping[str, Any]]


def messages_of(value: Any, where: str) -> list[dict[str, Any]]:
    """The messages of one chat, checked.

    Args:
        value: A list of {"role": …, "content": …}; fields that are null are left out.
        where: What holds it, in errors.

    Raises:
        DataError: If it is something else, a turn is empty, or the last one is not the assistant's.
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(
            f'{where}: messages is {_shown(value)}; it must be a list of {{"role": …, "content": '
            "…}."
        )
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise DataError(f"{where}: message {number} is {_shown(message)}, not an object.")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str) or not message[name].strip():
                raise DataError(
                    f"{where}: message {number} has {name} {_shown(message.get(name))}; it must be "
                    "text that is not empty."
                )
        messages.append({name: field for name, field in message.items() if field is not None})
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: the last message is the {messages[-1]['role']}'s; it must be the "
            "assistant's, whose tokens carry the labels."
        )
    return messages


def require_template(tokenizer: Any, field: str) -> None:
    """Refuses a tokenizer without a chat template.

    Raises:
        DataError: If it has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{field} is given, but this model's tokenizer has no chat template; use a chat model, "
            "or give text."
        )


def asking(messages: Messages, tokenizer: Any, where: str) -> str:
    """The text with which the template asks for an answer to some messages.

    Args:
        messages: The messages.
        tokenizer: A `transformers` tokenizer with a chat template.
        where: What holds them, in errors.

    Raises:
        DataError: If the template refuses the messages.
    """
    return _applied(messages, tokenizer, where, asks=True)


def rendered(messages: Messages, tokenizer: Any, where: str) -> tuple[str, str]:
    """The text before the last turn, and what the last turn adds to it.

    Args:
        messages: The messages of one chat, from `messages_of`.
        tokenizer: A `transformers` tokenizer with a chat template.
        where: What holds the chat, in errors.

    Raises:
        DataError: If the template refuses the messages; or if what it makes of all of them does not
            begin with what it makes of those before the last.
    """
    whole = _applied(messages, tokenizer, where, asks=False)
    before = asking(messages[:-1], tokenizer, where)
    if not whole.startswith(before):
        pairs = enumerate(zip(whole, before, strict=False))
        length = next((k for k, (one, other) in pairs if one != other), len(whole))
        raise DataError(
            f"{where}: the chat template writes the messages before the last one differently when "
            f"that one follows: {_around(before, length)} becomes {_around(whole, length)}. Which "
            "tokens are the last turn's cannot be told; give the rendered text as prompt and "
            "completion."
        )
    return before, whole[len(before) :]


def _applied(messages: Messages, tokenizer: Any, where: str, *, asks: bool) -> str:
    """The text of messages, and if it `asks`, how the template then begins an answer."""
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=asks
        )
    except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
        raise DataError(
            f"{where}: the model's chat template refuses these messages: {first_line(error)}."
        ) from error
    return text


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _around(text: str, place: int) -> str:
    return repr(text[max(0, place - 10) : place + 20])
