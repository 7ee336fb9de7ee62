"""The failures of workers: announced to the others, and raised by them instead of waiting forever.

A worker that fails announces it in the process group's key-value store. The others raise
`PeerError` at their next collective, or when they look between two of them.
"""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ekfac_dist.errors import PeerError, UserError, first_line, status_of
from ekfac_dist.runtime.out_of_memory import shortage

PEER_CHECK_SECONDS = 1.0
AGREED = "_ekfac_dist_agreed"  # marks an error that every worker raised together
LEFT = "/left"  # ends the key of a failure after which a worker comes to no collective
_FIRST = "_ekfac_dist_first"  # marks an error that was announced before any other

# What CUDA, or NCCL in its stead, says of a failure of the worker's own device.
_OWN_DEVICE = re.compile(r"CUDA (error|failure)", re.IGNORECASE)
# What gloo says of a connection that ended, wherever it is met.
_CONNECTION = re.compile(r"gloo|[Cc]onnection (closed|reset)|Timed out waiting")


@dataclass
class Peers:
    """One worker of several, and what it knows of the failures of the others.

    Attributes:
        rank: This worker's number, from 0.
        size: Number of workers, W.
        local_rank: This worker's number on its host.
        device: Where this worker computes.
        backend: Name of the process group's backend; "none" for one worker.
        fsdp: Version of FSDP by which the launcher's configuration shards models; 0: it does not.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    backend: str
    fsdp: int = 0
    _failure_key: str = field(default="", repr=False)
    _last_peer_check: float = field(default=0.0, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this is worker 0, which prints, decomposes and writes."""
        return self.rank == 0

    @property
    def failure_key(self) -> str:
        """The key of an announced failure in the key-value store."""
        return self._failure_key

    def announce_failure(
        self, error: BaseException, store: Any = None, *, leaves: bool = True
    ) -> bool:
        """Announces that this worker has failed.

        Args:
            error: The failure.
            store: A client of the key-value store; None for the main thread's.
            leaves: Whether the failed worker comes to no collective any more; else it still comes
                to the one in which all agree on the failure.

        Returns:
            Whether it is the first failure of any worker, which is the one to report.
        """
        if self.size == 1 or getattr(error, _FIRST, False):
            return True
        message = str(error)
        if not isinstance(error, UserError):
            message = f"{type(error).__name__}: {message}"
        try:
            store = default_store() if store is None else store
            first = store.add(self._failure_key + "/number", 1) == 1
            if first:
                setattr(error, _FIRST, True)
                store.set(self._failure_key, json.dumps([self.rank, message, status_of(error)]))
            if leaves:
                store.set(self._failure_key + LEFT, "")
        except RuntimeError:
            return True  # the key-value store is gone with its worker
        return first

    def key_value_store(self) -> Any:
        """A client of the process group's key-value store for use in another thread."""
        return default_store().clone()

    def check_peers(self) -> None:
        """Raises `PeerError` if another worker has announced its failure; looks once a second."""
        now = time.monotonic()
        if self.size == 1 or now - self._last_peer_check < PEER_CHECK_SECONDS:
            return
        self._last_peer_check = now
        with self._collective():
            self._raise_if_announced()

    def _raise_if_announced(self) -> None:
        store = default_store()
        if store.check([self._failure_key]):
            rank, message, status = json.loads(store.get(self._failure_key))
            raise PeerError(f"worker {rank} of {self.size}: {message}", status=status)

    def _cause_of(self, error: Exception) -> Exception:
        """Another worker's announced failure, or its loss, if an error only follows from it."""
        for_user = shortage(error)
        if for_user is not None or not isinstance(error, RuntimeError):
            return for_user or error
        try:
            with suppress(RuntimeError):  # the key-value store may be gone with its worker
                self._raise_if_announced()
        except PeerError as announced:
            return announced
        is_of_connection = isinstance(error, dist.DistError) or _CONNECTION.search(str(error))
        return _lost(error) if is_of_connection and not _is_of_own_device(error) else error

    @contextmanager
    def _collective(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            for_user = shortage(error)
            if for_user is not None:
                raise for_user from error
            # A connection that closes in a collective means that a worker has left. If it announced
            # why, that is the cause to report.
            with suppress(RuntimeError):  # the key-value store may be gone with its worker
                self._raise_if_announced()
            if _is_of_own_device(error):
                raise
            raise _lost(error) from error


def _is_of_own_device(error: Exception) -> bool:
    """Whether an error is of this worker's own device: later calls on it fail likewise."""
    accelerator_error = getattr(torch, "AcceleratorError", ())  # from torch 2.8 on
    return isinstance(error, accelerator_error) or bool(_OWN_DEVICE.search(str(error)))


def _lost(error: Exception) -> PeerError:
    # Gloo begins with a line of its own source and ends with advice on its logs.
    cause = re.sub(r"^\[\S+:\d+\] ", "", first_line(error)).partition(". ")[0]
    return PeerError(
        f"The connection to another worker was lost ({cause}): it has ended without a word. Look "
        "for that worker's own message, or for the system ending it for memory."
    )


def was_agreed(error: BaseException) -> bool:
    """Whether every worker raised this error together, so that worker 0 can speak for all."""
    return getattr(error, AGREED, False)


def default_store() -> Any:
    """The process group's key-value store."""
    return dist.distributed_c10d._get_default_store()
