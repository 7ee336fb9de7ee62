"""Prefetching: a thread prepares the next items while the caller works on the current one."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def prefetch(
    make: Callable[[T], U], items: Iterable[T], depth: int = 2
) -> Generator[U, None, None]:
    """Yields make(item) for each item, in order, computed in a thread ahead of its use.

    Args:
        make: Prepares one item. Its error is raised where its result would have been yielded.
        items: The items.
        depth: Largest number of results that are prepared ahead. Those left when the iteration ends
            early are dropped.
    """
    with ThreadPoolExecutor(1) as thread:
        futures: deque[Future[U]] = deque()
        try:
            for item in items:
                futures.append(thread.submit(make, item))
                if len(futures) > depth:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()
        finally:
            for future in futures:
                future.cancel()
