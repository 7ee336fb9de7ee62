"""A heartbeat between workers, by which a stopped worker or a lost host is noticed and named.

A worker that fails announces it, and one that exits closes its connections. A worker that is
stopped does neither, and the others would wait for it in their next collective. So a thread of each
worker regularly increases a counter in the key-value store, its beat, and watches the next worker's
counter:

    worker 0 ── watches ──> 1 ──> 2 ──> 0

Silence is measured in beats of the watching worker, so that a pause of all workers at once counts
as none. Beats go on whatever the main thread does, so with a heartbeat workers may wait for each
other's work without limit; see `World.wait_for_all`.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

from ekfac_dist.errors import DEFECT, PeerError, Preempted
from ekfac_dist.runtime.logs import LOGGER
from ekfac_dist.runtime.peers import was_agreed
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.terminal import show, visible

BEAT_SECONDS = 3.0
BEATS = 18  # beats without a sign after which a worker counts as lost
_NO_STORE = "The host of the workers' key-value store does not answer: it or its network is lost"
_UNTIL_GIVEN_UP = (
    "This worker's wait for others raises an error only when the system gives the connection up, "
    "perhaps in a quarter of an hour; you can end it now."
)

_last_words: list[Callable[[str], None]] = []


@contextmanager
def last_words(tell: Callable[[str], None]) -> Iterator[None]:
    """Context in which others are told why, before a heartbeat ends this process.

    Args:
        tell: Is called with the reason, a sentence; takes a few seconds at most.
    """
    _last_words.append(tell)
    try:
        yield
    finally:
        _last_words.remove(tell)


@contextmanager
def heartbeat(
    world: World, beat_seconds: float = BEAT_SECONDS, *, owns_process: bool = True
) -> Iterator[None]:
    """Context in which a worker that stays silent for `BEATS` beats ends all other workers.

    The command line's main thread may be waiting in a call that cannot be interrupted, so its
    process is ended, with status 1, after one of the workers has printed why. In a user's own
    script the next wait for other workers raises `PeerError` instead.

    Args:
        world: The workers.
        beat_seconds: Seconds between two beats of a worker.
        owns_process: Whether the process may be ended: true for the command line, false in a
            user's script.
    """
    if world.size == 1:
        yield
        return
    is_over, answers = threading.Event(), _Answers()
    arguments = (world, beat_seconds, is_over, owns_process, answers)
    threading.Thread(target=_beat, args=arguments, daemon=True).start()
    guard = (world, beat_seconds, is_over, answers, owns_process)
    threading.Thread(target=_require_answers, args=guard, daemon=True).start()
    try:
        with world.watched():
            yield
    except BaseException as error:
        if not owns_process and not was_agreed(error):  # the command line announces it itself
            world.announce_failure(error)
        raise
    finally:
        is_over.set()


@dataclass
class _Answers:
    """Answers of the key-value store to the beating thread.

    Attributes:
        number: How often it has answered.
    """

    number: int = 0


def _require_answers(
    world: World,
    beat_seconds: float,
    is_over: threading.Event,
    answers: _Answers,
    owns_process: bool,
) -> None:
    """The thread that ends a worker whose key-value store is lost; in a script it says so.

    The beating thread has then got an error. Or, on a host that is cut off from the store's, it
    waits for an answer until the system gives the connection up: a quarter of an hour, perhaps.
    """
    last, missed = 0, 0
    while not is_over.wait(beat_seconds):
        missed = missed + 1 if answers.number == last else 0
        last = answers.number
        if missed >= BEATS and owns_process:
            _end_process(world, None, _NO_STORE)
        if missed >= BEATS:
            LOGGER.error("%s: %s. %s", world.who, _NO_STORE, _UNTIL_GIVEN_UP)
            return


def _beat(
    world: World,
    beat_seconds: float,
    is_over: threading.Event,
    owns_process: bool,
    answers: _Answers,
) -> None:
    """The thread of one worker: writes its own beats and watches the next worker's."""
    store = world.key_value_store()
    store.set_timeout(timedelta(seconds=BEATS * beat_seconds))
    watched = (world.rank + 1) % world.size
    own_key, watched_key = f"ekfac_dist/beat/{world.rank}", f"ekfac_dist/beat/{watched}"
    own_beats, last_beat = 0, b""
    missed = 0  # own beats since the watched worker's last one
    since_failure = 0  # own beats since a failure was announced
    while not is_over.wait(beat_seconds):
        own_beats += 1
        try:
            store.set(own_key, str(own_beats))
            beat = store.get(watched_key) if store.check([watched_key]) else b""
            failure = _announced_failure(world, store)
        except RuntimeError:
            # The store is gone: with its worker, whose end the main threads notice, or with its
            # host, which `_require_answers` notices.
            return
        answers.number += 1
        missed = missed + 1 if beat == last_beat else 0
        last_beat = beat
        if missed >= BEATS:
            silence = f"{BEATS * beat_seconds:.0f} seconds"
            message = f"worker {watched} of {world.size} has not answered for {silence}"
            message += ": it was stopped, or its host or its network is lost"
            if owns_process:
                _end_process(world, store, message)
            with suppress(RuntimeError):
                world.announce_failure(PeerError(message), store)
            missed = 0
        if not owns_process:
            continue
        since_failure = 0 if failure is None else since_failure + 1
        if failure is not None and since_failure >= BEATS:  # the main thread has not ended on it
            rank, message, status = failure
            if rank == world.rank:
                show(visible(f"ekfac-dist: error: {world.who}: {message}"), error=True)
            if rank == world.rank or since_failure > BEATS:  # the failed worker prints first
                _exit(status, message)


def _announced_failure(world: World, store: Any) -> tuple[int, str, int] | None:
    """Rank, message and exit status of a worker that announced a failure.

    None if there is none; a preempted worker has not failed.
    """
    if not store.check([world.failure_key]):
        return None
    rank, message, status = json.loads(store.get(world.failure_key))
    return None if status == Preempted.status else (rank, message, status)


def _end_process(world: World, store: Any, message: str) -> NoReturn:
    """Ends the process, after printing the message if no other worker has done so."""
    with suppress(Exception):
        if store is None or world.announce_failure(PeerError(message), store):
            show(visible(f"ekfac-dist: error: {message}"), error=True)
    _exit(DEFECT, message)


def _exit(status: int, message: str) -> NoReturn:
    for tell in _last_words:
        with suppress(Exception):
            tell(message)
    os._exit(status)
