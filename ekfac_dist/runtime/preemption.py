"""Handles SIGTERM, with which schedulers announce that a machine will be taken away.

Inside the context `deferred` the signal is only noted: the work goes on until it reaches a point at
which its state is saved, and there it checks `requested`. Outside of it the signal ends the process
at once. The exit status is the same, that of `Preempted`.
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
    """Installs the handler of SIGTERM; only for the command line, in its main thread."""
    signal.signal(signal.SIGTERM, _on_signal)


@contextmanager
def deferred() -> Iterator[None]:
    """Context in which SIGTERM is only noted; see `requested`."""
    global _is_deferred
    _is_deferred = True
    try:
        yield
    finally:
        _is_deferred = False


def requested() -> bool:
    """Whether SIGTERM has been received."""
    return _is_requested


def end_if_requested() -> None:
    """Ends the run if SIGTERM has been received; to be called when everything done is stored.

    Raises:
        Preempted: If SIGTERM has been received.
    """
    if _is_requested:
        raise ended("what is done is stored")


def ended(stored: str) -> Preempted:
    """The error that ends a run after SIGTERM.

    Args:
        stored: Clause that says what is stored.
    """
    return Preempted(f"Ended by SIGTERM; {stored}: {_AGAIN}.")


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _is_requested
    _is_requested = True
    if _is_deferred:
        return
    if os.environ.get("RANK", "0") == "0":
        os.write(sys.stderr.fileno(), f"ekfac-dist: ended by SIGTERM; {_AGAIN}\n".encode())
    os._exit(Preempted.status)
