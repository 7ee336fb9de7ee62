"""Queries as texts: what a line of a file, or a mapping from Python, asks. No tokens."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ekfac_dist.data.chats import messages_of
from ekfac_dist.errors import DataError, first_line

# Fields of a query beside its texts.
OPTIONAL = ("group", "against")


@dataclass(frozen=True)
class Query:
    """The text of one query.

    Attributes:
        prompt: The text before the completion; its tokens carry no label. May be empty.
        completion: The text whose log-probability the query is about.
        group: Name of its query group; None: the query is a group of its own.
        messages: The chat that prompt and completion are rendered from, which are "" until then;
            None for a text.
        line: Line of the file, from 1; of a query from Python its index, from 0.
        where: The query's name in errors.
        against: The completion that a contrast is against, after the same prompt; of a chat that is
            not rendered, what the last turn would say instead. None: no contrast.
    """

    prompt: str
    completion: str
    group: str | None
    line: int
    where: str
    messages: tuple[dict[str, Any], ...] | None = None
    against: str | None = None

    def other_side(self) -> "Query":
        """Of a contrast: the text that it is against, as a query."""
        assert self.against is not None
        return replace(self, completion=self.against, against=None, where=f"{self.where}, against")


def read_queries(path: str | Path) -> list[Query]:
    """Reads the queries of a JSONL file.

    Args:
        path: A file of JSON objects, one a line, each with "prompt" and "completion", or "text", or
            "messages", and perhaps an "against" and a "group"; blank lines and other fields are
            ignored.

    Raises:
        DataError: If the file cannot be read or holds no query, or one of its lines, which is
            named, is no query.
    """
    queries = []
    try:
        with Path(path).open("rb") as opened:
            for number, line in enumerate(opened, start=1):
                if line.strip():
                    queries.append(_parse_line(line, f"{path}, line {number}", number))
    except OSError as error:
        raise DataError(
            f"The queries {path} cannot be read: {error.strerror or error}. Give a .jsonl file."
        ) from error
    if not queries:
        raise DataError(f"{path} holds no query; {_LINE_ADVICE}.")
    return queries


_LINE_ADVICE = 'each line must be {"prompt": …, "completion": …}, {"text": …} or {"messages": […]}'


def _parse_line(line: bytes, where: str, number: int) -> Query:
    try:
        # Some editors put a byte order mark before the first line.
        fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: is not UTF-8 text ({error.reason} at byte {error.start + 1}); save the file "
            "as UTF-8."
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: is not JSON ({error.msg}: column {error.colno}); {_LINE_ADVICE}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON ({first_line(error)}); {_LINE_ADVICE}.") from error
    if not isinstance(fields, dict):
        raise DataError(f"{where}: is {type(fields).__name__}, not an object; {_LINE_ADVICE}.")
    return parse_query(fields, where, number)


def parse_query(fields: Mapping[str, Any], where: str, line: int) -> Query:
    """A query from its fields.

    Args:
        fields: "prompt" and "completion", or "text", or "messages", and perhaps a "group"; but for
            a "text" perhaps an "against"; others are ignored.
        where: The query's name in errors.
        line: Its line, or its index.

    Raises:
        DataError: If a field is missing, superfluous, empty, or no text; or if a query is against
            itself.
    """
    kinds = ("prompt", "completion", "text", "messages")
    names = [name for name in kinds if fields.get(name) is not None]
    if names not in (["prompt", "completion"], ["text"], ["messages"]):
        present = " and ".join(names or map(str, fields)) or "no text"
        raise DataError(f"{where}: has {present}; {_LINE_ADVICE}.")
    if fields.get("against") is not None and names == ["text"]:
        raise DataError(
            f"{where}: has text and against, but a contrast is of two completions of one prompt; "
            'give the text as "completion", and as "prompt" what comes before it, or "".'
        )
    group, against = fields.get("group") or None, fields.get("against")
    messages = None
    if names == ["messages"]:
        messages = tuple(messages_of(fields["messages"], where))
        names = []
    for name in (*names, *(name for name in OPTIONAL if fields.get(name) is not None)):
        _require_text(fields[name], name, where)
    if messages is None:
        completion = fields["text"] if names == ["text"] else fields["completion"]
        if not completion:
            raise DataError(f"{where}: {names[-1]} is empty; it must hold what the query is about.")
        query = Query(fields.get("prompt") or "", completion, group, line, where, None, against)
    else:
        completion = messages[-1]["content"]
        query = Query("", "", group, line, where, messages, against)
    if against is not None:
        _require_contrast(completion, against, where)
    return query


def _require_text(value: Any, name: str, where: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {value!r}; it must be text.")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(
            f"{where}: {name} is {value!r}, which holds half of a surrogate pair; give whole "
            "characters."
        )


def _require_contrast(completion: str, against: str, where: str) -> None:
    if not against.strip():
        raise DataError(
            f"{where}: against is {against!r}; it must hold what the model could say instead, or "
            "be left out."
        )
    if against == completion:
        raise DataError(
            f"{where}: against is what the query is about, {completion!r}, so the two differ by "
            "nothing; give another text, or leave it out."
        )
