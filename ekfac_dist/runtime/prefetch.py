"""Work for the host, done in a thread while the device, or the caller, is at what came before."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def prefetch(make: Callable[[T], U], items: Iterable[T], depth: int = 2) -> Iterator[U]:
    """Makes something of each item, in order, up to `depth` of them before they are asked for.

    An error comes where its item would have; what was not asked for by then is dropped.
    """
    with ThreadPoolExecutor(1) as thread:
        waiting: deque[Future[U]] = deque()
        try:
            for item in items:
                waiting.append(thread.submit(make, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
