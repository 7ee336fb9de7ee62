"""What a client waits for, and the events by which it hears of it.

A job is made by an HTTP request, and answered by the loop in the main thread; its events travel
from there to whoever listens.
"""

import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ekfac_dist.influence.asking import Question

# The statuses that end a job early.
CANCELLED, UNUSABLE, ENDING = 409, 422, 503
CANCELLED_SENTENCE = "The question was cancelled."
_LAST = ("answer", "error")


@dataclass(frozen=True)
class Event:
    """One event of a job.

    Attributes:
        name: Its name.
        data: Its content, JSON in ASCII, without line ends.
        status: Of a response with this event alone.
    """

    name: str
    data: bytes
    status: int = 200

    @property
    def is_last(self) -> bool:
        """Whether no event follows."""
        return self.name in _LAST


@dataclass(frozen=True)
class Continuation:
    """What POST /v1/complete asks: arguments of `Session.complete`.

    Attributes:
        prompt: The text to go on from.
        messages: Or a chat.
        max_tokens: Most tokens.
        temperature: 0: the likeliest token each time.
        seed: Of the drawn tokens.
    """

    prompt: str
    messages: list[dict[str, Any]] | None
    max_tokens: int
    temperature: float
    seed: int


@dataclass(eq=False)
class Job:
    """A question, or a prompt to go on from, and who waits for the answer.

    Attributes:
        work: What is asked.
        listener: Takes the events, in any thread.
        request: The request with every default filled in, as JSON has it.
        names: The request's name of each field that sentences may name otherwise; see
            `field_names`.
        streams: Whether the client hears of the steps; else of the end alone.
        id: Its name in addresses; random, so that others cannot guess it.
        asked_at: When it was asked, by `time.monotonic`.
        started_at: When answering it began.
        is_cancelled: Whether nobody wants it any more.
    """

    work: Question | Continuation
    listener: Callable[[Event], None]
    request: dict[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    streams: bool = False
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    asked_at: float = field(default_factory=time.monotonic)
    started_at: float = 0.0
    is_cancelled: bool = False

    @property
    def kind(self) -> str:
        """What the metrics call it."""
        return "influence" if isinstance(self.work, Question) else "complete"

    @property
    def seconds_waited(self) -> float:
        """How long it waited before answering began."""
        return self.started_at - self.asked_at

    def post(self, name: str, data: Any) -> None:
        """Tells an event to a client that streams, and the last one to all.

        Args:
            name: Its name.
            data: Its content, as types that JSON has.
        """
        if self.streams or name in _LAST:
            self.listener(Event(name, encoded(data)))

    def refuse(self, status: int, sentence: str) -> None:
        """Tells the client that there will be no answer."""
        content: dict[str, Any] = {"detail": sentence}
        if self.streams:  # a stream's own status has long been sent
            content = {"status": status, **content}
        self.listener(Event("error", encoded(content), status))


def encoded(value: Any) -> bytes:
    """JSON in ASCII: no control character, line end or half of a surrogate pair is in it as such.

    Raises:
        ValueError: If the value holds NaN or infinity.
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")
