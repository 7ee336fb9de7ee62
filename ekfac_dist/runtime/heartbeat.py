"""A worker that is stopped, or whose host is lost, is noticed and named by the others.

A worker that fails says so, and one that ends closes its connections; one that is stopped does
neither, and the others would wait for it in their next collective. So each worker counts up a
number in the key-value store, from a thread, and watches the next worker's. The patience is counted
in beats of the watcher's own, so a pause of all of them at once is none.

    worker 0 ── watches ──> 1 ──> 2 ──> 0

Whatever a worker's main thread does, its beats tell that it lives. So within a heartbeat workers
wait for each other's work without limit; see `World.wait_for_all`.
"""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

from ekfac_dist.errors import DEFECT, PeerError, Preempted
from ekfac_dist.runtime.peers import was_agreed
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.terminal import show, visible

BEAT_SECONDS = 3.0
BEATS = 18


@contextmanager
def heartbeat(
    world: World, beat_seconds: float = BEAT_SECONDS, *, owns_process: bool = True
) -> Iterator[None]:
    """Within it a worker that does not answer for a while ends the program of all others.

    A program that owns its process may have a main thread that is waiting where nothing reaches it,
    so the process is ended, with status 1, after one of the workers has said why. In somebody's own
    script the others' next wait raises `PeerError` instead.

    Args:
        world: The workers.
        beat_seconds: How often each gives a sign; it may leave out a few.
        owns_process: Whether the process may be ended.
    """
    if world.size == 1:
        yield
        return
    over = threading.Event()
    arguments = (world, beat_seconds, over, owns_process)
    threading.Thread(target=_beat, args=arguments, daemon=True).start()
    try:
        with world.watched():
            yield
    except BaseException as error:
        if not owns_process and not was_agreed(error):  # a program says so where it ends
            world.announce_failure(error)
        raise
    finally:
        over.set()


def _beat(world: World, beat_seconds: float, over: threading.Event, owns_process: bool) -> None:
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
            if not owns_process or over.wait(BEATS * beat_seconds):
                return  # a script's main thread meets the same where it waits
            _end(world, None, "The host of the workers' key-value store does not answer")
        missed = missed + 1 if found == seen else 0
        seen = found
        if missed >= BEATS:
            silence = f"{BEATS * beat_seconds:.0f} seconds"
            said = f"worker {watched} of {world.size} has not answered for {silence}"
            said += ": it was stopped, or its host or its network is lost"
            if owns_process:
                _end(world, store, said)
            with suppress(RuntimeError):
                world.announce_failure(PeerError(said), store)
            missed = 0
        if not owns_process:
            continue
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
