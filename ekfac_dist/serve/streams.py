"""Waiting for a job's events in the event loop of the HTTP thread, until the client goes away."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response

from ekfac_dist.serve.jobs import Event

T = TypeVar("T")
HEARTBEAT_SECONDS = 10.0


class Listening:
    """Takes a job's events in any thread, and gives them in the event loop that made it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def __call__(self, event: Event) -> None:
        """Takes an event."""
        with suppress(RuntimeError):  # the loop has ended, and with it who listened
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def last(self) -> Event:
        """Waits for the last event."""
        while not (event := await self._events.get()).is_last:
            pass
        return event

    async def text(self) -> AsyncIterator[bytes]:
        """The events as server-sent ones; a comment where there was none for a while."""
        number, is_over = 0, False
        while not is_over:
            try:
                event = await asyncio.wait_for(self._events.get(), HEARTBEAT_SECONDS)
            except TimeoutError:
                yield b": still here\n\n"
                continue
            yield b"id: %d\nevent: %s\ndata: %s\n\n" % (number, event.name.encode(), event.data)
            number, is_over = number + 1, event.is_last


async def unless_left(wanted: Awaitable[T], receive: Callable[[], Awaitable[Any]]) -> T | None:
    """The result of what a client waits for; None if the client goes away first.

    Args:
        wanted: What is waited for; it is cancelled if the client goes away.
        receive: The request's messages, whose body has been read.
    """
    working, leaving = asyncio.ensure_future(wanted), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()


async def _left(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of server-sent events.

    Args:
        listening: The events.
        when_left: Is called if the client goes away before the last one.
    """

    media_type = "text/event-stream"

    def __init__(self, listening: Listening, when_left: Callable[[], object]) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._listening, self._when_left = listening, when_left

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends the events as they come."""
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": [*self.raw_headers, (b"x-accel-buffering", b"no")],
            }
        )

        async def write() -> bool:
            async for part in self._listening.text():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
            return True

        is_whole = None
        try:
            is_whole = await unless_left(write(), receive)
        finally:
            if not is_whole:
                self._when_left()
