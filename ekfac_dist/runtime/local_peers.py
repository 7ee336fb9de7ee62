"""Notices at once that another worker of this host has ended.

The heartbeat notices a lost worker after a minute, wherever it was. Who keeps people waiting needs
to know sooner: a thread looks every second whether the processes of this host's other workers are
there, and announces the failure of one that is not. The main threads raise it in their next wait.
"""

import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import psutil

from ekfac_dist.errors import PeerError
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.terminal import show, visible

LOOK_SECONDS = 1.0


@contextmanager
def watching_this_host(world: World) -> Iterator[None]:
    """Context in which the end of another worker of this host is announced as its failure.

    A collective; every worker leaves it between the same collectives.

    Args:
        world: The workers.
    """
    if world.size == 1:
        yield
        return
    me = psutil.Process()
    workers = world.gather((socket.gethostname(), os.getpid(), me.create_time()))
    peers = {
        rank: peer
        for rank, (host, pid, created) in enumerate(workers)
        if rank != world.rank and host == socket.gethostname()
        # Hosts of one name may have processes of their own under the same numbers.
        if (peer := _process(pid)) is not None and peer.create_time() == created
    }
    is_over = threading.Event()
    threading.Thread(target=_watch, args=(world, peers, is_over), daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.Error:
        return None


def _watch(world: World, peers: Mapping[int, psutil.Process], is_over: threading.Event) -> None:
    store = world.key_value_store()
    while not is_over.wait(LOOK_SECONDS):
        gone = next((rank for rank, peer in peers.items() if not _is_there(peer)), None)
        if gone is None:
            continue
        message = (
            f"worker {gone} of {world.size} has ended (process {peers[gone].pid}): look for its "
            "own message, or for the system ending it for memory"
        )
        with suppress(RuntimeError):
            if not is_over.is_set() and world.announce_failure(PeerError(message), store):
                show(visible(f"ekfac-dist: error: {message}"), error=True)
        return


def _is_there(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
