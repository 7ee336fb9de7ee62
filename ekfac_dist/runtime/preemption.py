"""SIGTERM, by which schedulers announce that a machine will be taken away.

Within `deferred` it is only noted, and whoever works asks `requested` where there is something to
save; anywhere else it ends the process at once, with the same status.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ekfac_dist.errors import Preempted

_AGAIN = "run the same command again to go on"

_is_deferred = False
_is_requested = False


def install() -> None:
    """Handles SIGTERM from now on; for a program that owns its process, in its main thread."""
    signal.signal(signal.SIGTERM, _on_signal)


@contextmanager
def deferred() -> Iterator[None]:
    """Within it SIGTERM is noted; what has to be done comes first."""
    global _is_deferred
    _is_deferred = True
    try:
        yield
    finally:
        _is_deferred = False


def requested() -> bool:
    """Whether SIGTERM has come."""
    return _is_requested


def end_if_requested() -> None:
    """Ends the work if SIGTERM has come; all that is done is stored.

    Raises:
        Preempted: It has.
    """
    if _is_requested:
        raise ended("what is done is stored")


def ended(stored: str) -> Preempted:
    """The error that ends the work, with what is stored in words."""
    return Preempted(f"Ended by SIGTERM; {stored}: {_AGAIN}.")


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _is_requested
    _is_requested = True
    if _is_deferred:
        return
    if os.environ.get("RANK", "0") == "0":
        os.write(sys.stderr.fileno(), f"ekfac-dist: ended by SIGTERM; {_AGAIN}\n".encode())
    os._exit(Preempted.status)
