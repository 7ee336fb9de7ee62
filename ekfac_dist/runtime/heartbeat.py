"""A worker that is stopped, or whose host is lost, is noticed and named by the others.

A worker that fails says so, and one that ends closes its connections; one that is stopped does
neither, and the others would wait for it in their next collective. So each worker counts up a
number in the key-value store, from a thread, and watches the next worker's. The patience is counted
in beats of the watcher's own, so a pause of all of them at once is none.

    worker 0 ── watches ──> 1 ──> 2 ──> 0
"""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

from ekfac_dist.errors import DEFECT, PeerError, Preempted
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.terminal import show, visible

BEAT_SECONDS = 3.0
BEATS = 18


@contextmanager
def heartbeat(world: World, beat_seconds: float = BEAT_SECONDS) -> Iterator[None]:
    """Within it a worker that does not answer for a while ends the program of all others.

    For a program that owns its process: its main thread may be waiting where nothing reaches it, so
    the process is ended, with status 1, after one of the workers has said why.

    Args:
        world: The workers.
        beat_seconds: How often each gives a sign; it may leave out a few.
    """
    if world.size == 1:
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_beat, args=(world, beat_seconds, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


def _beat(world: World, beat_seconds: float, over: threading.Event) -> None:
    store = world.key_value_store()
    store.set_timeout(timedelta(seconds=BEATS * beat_seconds))
    watched = (world.rank + 1) % world.size
    own, other = f"ekfac_dist/beat/{world.rank}", f"ekfac_dist/beat/{watched}"
    number, seen, missed, told = 0, b"", 0, 0
    while not over.wait(beat_seconds):
        number += 1
        try:
            store.set(own, str(number))
            found = store.get(other) if store.check([other]) else b""
            failure = _failure(world, store)
        except RuntimeError:
            # It has gone with its worker, whose end the others notice by themselves; or with its
            # host.
            if over.wait(BEATS * beat_seconds):
                return
            _end(world, None, "The host of the workers' key-value store does not answer")
        missed = missed + 1 if found == seen else 0
        seen = found
        if missed >= BEATS:
            silence = f"{BEATS * beat_seconds:.0f} seconds"
            said = f"worker {watched} of {world.size} has not answered for {silence}"
            _end(world, store, f"{said}: it was stopped, or its host or its network is lost")
        told = 0 if failure is None else told + 1
        if failure is not None and told >= BEATS:  # some main thread is kept from hearing of it
            rank, message, status = failure
            if rank == world.rank:
                show(visible(f"ekfac-dist: error: {world.who}: {message}"), error=True)
            if rank == world.rank or told > BEATS:  # who has failed speaks first
                os._exit(status)


def _failure(world: World, store: Any) -> tuple[int, str, int] | None:
    """What a worker has announced, its rank and status with it; a preempted one has not failed."""
    if not store.check([world.failure_key]):
        return None
    rank, message, status = json.loads(store.get(world.failure_key))
    return None if status == Preempted.status else (rank, message, status)


def _end(world: World, store: Any, said: str) -> NoReturn:
    with suppress(Exception):
        if store is None or world.announce_failure(PeerError(said), store):
            show(visible(f"ekfac-dist: error: {said}"), error=True)
    os._exit(DEFECT)
