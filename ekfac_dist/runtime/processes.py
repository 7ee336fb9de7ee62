"""The workers of a run, seen from one of them.

`World` is the only place that talks to `torch.distributed`. Each worker does the same things in the
same order, whatever their number, so one code path serves one worker and many. Two kinds of
failure are kept apart:

* inside `World.agree`, every worker learns of the failure of any, and all raise together;
* anywhere else a worker fails alone.

Either way the failure is announced in the process group's key-value store, and the others raise
`PeerError` at their next `check_peers` or collective.

A collective has a time-out, and one worker's work may take longer. So while a heartbeat watches the
workers (see `heartbeat`), they count themselves in the key-value store first, and whoever is early
waits there for as long as the others live; the collective itself is then short.
"""

import itertools
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ekfac_dist.errors import (
    DEFECT,
    LaunchError,
    PeerError,
    Preempted,
    UserError,
    first_line,
    status_of,
)
from ekfac_dist.runtime import preemption

T = TypeVar("T")

# The workers of other hosts may be started as much later than this one's.
COLLECTIVE_TIMEOUT = timedelta(hours=3)
BUCKET_BYTES = 64 * 2**20
PEER_CHECK_SECONDS = 1.0
LEAVING_SECONDS = 5.0  # how long a worker that SIGTERM has come to still waits for others
GLOO_SECONDS = 0.002
# Who waits for others looks again after 1/20 of the time that it has waited, within these limits.
_WAIT_SECONDS = (0.0002, 0.5)

_runs = itertools.count()
_AGREED = "_ekfac_dist_agreed"  # marks an error that every worker raised together
_FIRST = "_ekfac_dist_first"  # marks one that was announced before any other
_LEFT = "/left"  # ends the key of a failure after which a worker comes to no collective


def _says_yes(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def launched_processes() -> int:
    """How many workers the launcher says it started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass
class _Arrivals:
    """How often all workers have met before a collective, to tell when all are there again.

    Attributes:
        key: What they count under in the key-value store.
        number: How often this worker has come.
        are_watched: Whether a heartbeat tells of a worker that ends; else nobody waits here.
    """

    key: str = ""
    number: int = 0
    are_watched: bool = False


@dataclass
class World:
    """One worker's view of all of them.

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
    _arrivals: _Arrivals = field(default_factory=_Arrivals, repr=False)  # the same in `at`'s copies

    @classmethod
    def start(cls) -> "World":
        """Joins the process group that Accelerate's launcher describes, or works alone.

        Inside somebody's own script whose `Accelerator` exists already, that one is used.

        Raises:
            LaunchError: The launcher started several workers that do not see each other.
        """
        # Accelerate's launcher does not pass a configuration's use_cpu on to several workers.
        cpu = _says_yes("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        arguments: dict[str, Any] = {}
        if launched_processes() > 1 and not dist.is_initialized():
            arguments["timeout"] = COLLECTIVE_TIMEOUT
        try:
            state = PartialState(cpu=cpu, **arguments)
        except (RuntimeError, ValueError, dist.DistError) as error:
            raise LaunchError(
                f"The workers could not be connected: {first_line(error)}. Check the launcher's "
                "address, port and number of processes."
            ) from error
        size = state.num_processes
        if launched_processes() != size:
            raise LaunchError(
                f"The launcher started {launched_processes()} workers, but this one sees {size}. "
                "In a script with an Accelerator of its own and no GPU, make it with "
                "Accelerator(cpu=True); otherwise check the launcher's configuration."
            )
        sharding = size > 1 and _says_yes("ACCELERATE_USE_FSDP")
        device = state.device
        if device.type == "cpu":
            device = torch.device("cpu")  # accelerate says "cpu:0" for a worker of several
        elif device.type == "cuda" and device.index is None:
            # In a thread of another GPU, "cuda" would be that one.
            device = torch.device("cuda", torch.cuda.current_device())
        run = next(_runs)
        return cls(
            rank=state.process_index,
            size=size,
            local_rank=max(0, state.local_process_index),
            device=device,
            backend=str(state.backend or "none") if size > 1 else "none",
            fsdp=int(os.environ.get("FSDP_VERSION", "1")) if sharding else 0,
            _failure_key=f"ekfac_dist/failure/{run}",
            _arrivals=_Arrivals(f"ekfac_dist/arrivals/{run}"),
        )

    def at(self, device: torch.device) -> "World":
        """The same worker, computing on another device."""
        return replace(self, device=device)

    @property
    def is_main(self) -> bool:
        """Whether this is worker 0, which prints, decomposes and writes."""
        return self.rank == 0

    @property
    def who(self) -> str:
        """This worker in words."""
        return f"worker {self.rank} of {self.size}"

    def describe(self) -> tuple[str, str, int]:
        """Host, device and number of threads of this worker."""
        device = str(self.device)
        if self.device.type == "cuda":
            device = f"{device} ({torch.cuda.get_device_name(self.device)})"
        return socket.gethostname(), device, torch.get_num_threads()

    def mesh(self) -> DeviceMesh:
        """All workers as `torch.distributed` wants to be told of them."""
        return init_device_mesh(self.device.type, (self.size,))

    def close(self) -> None:
        """Leaves the process group, in good order, with the others."""
        if self.size > 1:
            dist.destroy_process_group()

    # -- collectives: every worker calls them in the same order ------------------------------------

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within it a heartbeat tells of workers that end, so that others may wait without limit.

        Entered and left by every worker between the same collectives.
        """
        before, self._arrivals.are_watched = self._arrivals.are_watched, True
        try:
            yield
        finally:
            self._arrivals.are_watched = before

    def wait_for_all(self) -> None:
        """Waits until every worker is here, however long that takes; only where they are watched.

        Every collective of this class begins with it.

        Raises:
            PeerError: A worker will never come: it has failed, or was lost.
            Preempted: SIGTERM has come, and not all of the others a few seconds later: they were
                asked to end too, or are lost.
        """
        if self.size == 1 or not self._arrivals.are_watched:
            return
        arrivals, store = self._arrivals, _default_store()
        arrivals.number += 1  # nobody comes again before all have come, so one counter will do
        start = last_look = time.monotonic()
        asked_to_end: float | None = None
        shortest, longest = _WAIT_SECONDS
        with self._collective():
            arrived = store.add(arrivals.key, 1)
            while arrived < arrivals.number * self.size:
                now = time.monotonic()
                if now - last_look >= PEER_CHECK_SECONDS:
                    last_look = now
                    if store.check([self._failure_key + _LEFT]):
                        self._raise_if_announced()
                if asked_to_end is None and preemption.requested():
                    asked_to_end = now
                if asked_to_end is not None and now - asked_to_end > LEAVING_SECONDS:
                    raise preemption.ended("what is done is stored")
                time.sleep(min(longest, max(shortest, (now - start) / 20)))
                arrived = store.add(arrivals.key, 0)

    def gather(self, value: T) -> list[T]:
        """Every worker's `value`, in rank order, on every worker."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self.wait_for_all()
        with self._collective():
            dist.all_gather_object(values, value)
        # gloo's thread frees what it sent only now, and needs the interpreter for it; a script that
        # ended this very moment would be aborted (torch 2.13).
        time.sleep(GLOO_SECONDS if self.backend == "gloo" else 0)
        return values

    def share(self, value: T) -> T:
        """Worker 0's `value`, on every worker."""
        if self.size == 1:
            return value
        box: list[Any] = [value if self.is_main else None]
        self.wait_for_all()
        with self._collective():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def broadcast_(self, tensor: Tensor, *, source: int = 0) -> Tensor:
        """Overwrites `tensor` in place with one worker's; shapes and dtypes must agree."""
        if self.size > 1:
            self.wait_for_all()
            with self._collective():
                dist.broadcast(tensor, src=source)
        return tensor

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor in place by its sum over all workers.

        Small tensors travel together in buckets of one dtype; large ones travel as they are.

        Args:
            tensors: Contiguous tensors of any shapes and dtypes, the same on every worker.
        """
        if self.size == 1:
            return
        self.wait_for_all()
        for bucket in _buckets(tensors, BUCKET_BYTES):
            alone = len(bucket) == 1
            flat = bucket[0] if alone else torch.cat([t.reshape(-1) for t in bucket])
            with self._collective():
                dist.all_reduce(flat)
            if alone:
                continue
            parts = flat.split([t.numel() for t in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def barrier(self) -> None:
        """Waits until every worker is here."""
        self.gather(None)

    @contextmanager
    def agree(
        self, *, takes_part: bool = True, together: tuple[type[Exception], ...] | None = None
    ) -> Iterator[None]:
        """Runs a block on every worker; if it fails on any, it fails on all.

        The others raise the failing worker's sentence, with the worker's name unless all that took
        part said the same. A block that holds collectives, as a sharded model's forward is one,
        says so: where a worker fails alone in it, the others wait for it there and can agree on
        nothing. The failure is announced then, and raised at once.

        Args:
            takes_part: Whether this worker really does something in the block.
            together: None: the block holds no collective. Else it does, and only these are raised
                on every worker at the same place, so that they can be agreed on.
        """
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught if together is None else self._cause_of(caught)
            # Who is in a long block need not finish it; but all are at the place where all end.
            at_once = together is not None and isinstance(error, Preempted)
            alone = not isinstance(error, together or ()) or isinstance(error, PeerError)
            leaves = together is not None and alone
            if not isinstance(error, PeerError) and not at_once:
                self.announce_failure(error, leaves=leaves)
            if leaves:
                raise error from (None if error is caught else caught)
        own = None
        if error is not None and not isinstance(error, PeerError):
            own = (type(error).__name__, str(error), status_of(error))
        reports = self.gather((takes_part, own))
        failed = [rank for rank, (_, told) in enumerate(reports) if told is not None]
        if not failed:
            if error is not None:
                raise error
            return
        self._failure_key += "+"  # what was announced has been told
        first = reports[failed[0]][1]
        assert first is not None
        kind, message, status = first
        alike = {told for took_part, told in reports if took_part} == {first}
        is_defect = status == DEFECT
        if is_defect:
            message = f"{kind}: {message}"
        if not alike or is_defect:
            message = f"worker {failed[0]} of {self.size}: {message}"
        if error is None or own is None:
            shown: Exception = PeerError(message, status=status)
        elif isinstance(error, UserError):
            shown = type(error)(message)
        else:
            shown = error  # a defect keeps its traceback
        setattr(shown, _AGREED, True)
        if shown is error:
            raise shown
        raise shown from error

    def require_same(self, what: str, value: object) -> None:
        """Refuses, on every worker, a value that is not the same on all of them.

        Args:
            what: What it is, in the plural.
            value: Something that can be sent and compared. Of a dictionary the first field that
                differs is named.

        Raises:
            LaunchError: The values differ.
        """
        values = self.gather(value)
        other = next((rank for rank, each in enumerate(values) if _differ(each, values[0])), None)
        with self.agree():
            if other is not None:
                raise LaunchError(
                    f"Worker {other} has other {what} than worker 0 "
                    f"({_difference(values, other)}); every worker must be given the same."
                )

    def main_first(self, action: Callable[[], T]) -> T:
        """Runs `action` on each host's first worker, then on its others, which find caches filled.

        If it fails anywhere it fails everywhere, without waiting.
        """
        result: list[T] = []
        for mine in (self.local_rank == 0, self.local_rank != 0):
            with self.agree(takes_part=mine):
                if mine:
                    result.append(action())
        return result[0]

    def once_per_host(self, action: Callable[[], T]) -> T:
        """Runs `action` on each host's first worker alone and gives its result to all of the host.

        If it fails anywhere it fails everywhere.
        """
        result: Any = None
        is_first = self.local_rank == 0
        with self.agree(takes_part=is_first):
            if is_first:
                result = action()
        return self.gather(result)[self.rank - self.local_rank]

    def on_main(self, action: Callable[[], T]) -> T | None:
        """Runs `action` on worker 0 alone and gives its result there; None elsewhere.

        If it fails, it fails everywhere.
        """
        result: T | None = None
        with self.agree(takes_part=self.is_main):
            if self.is_main:
                result = action()
        return result

    # -- failures of one worker alone -------------------------------------------------------------

    @property
    def failure_key(self) -> str:
        """What a failure is announced under in the key-value store."""
        return self._failure_key

    def announce_failure(
        self, error: BaseException, store: Any = None, *, leaves: bool = True
    ) -> bool:
        """Tells the others that this worker has failed; True if none had said so of another cause.

        Args:
            error: Why.
            store: A client of the key-value store; None: the main thread's.
            leaves: Whether nobody need wait for a worker any longer; else this one still comes to
                the collective in which all agree on the failure.
        """
        if self.size == 1 or getattr(error, _FIRST, False):
            return True
        message = str(error)
        if not isinstance(error, UserError):
            message = f"{type(error).__name__}: {message}"
        try:
            store = _default_store() if store is None else store
            first = store.add(self._failure_key + "/number", 1) == 1
            if first:
                setattr(error, _FIRST, True)
                store.set(self._failure_key, json.dumps([self.rank, message, status_of(error)]))
            if leaves:
                store.set(self._failure_key + _LEFT, "")
        except RuntimeError:
            return True  # the key-value store has gone with its worker, and said nothing
        return first

    def key_value_store(self) -> Any:
        """A client of the process group's key-value store, for another thread than the main one."""
        return _default_store().clone()

    def check_peers(self) -> None:
        """Raises `PeerError` if another worker has announced its failure; looks once a second."""
        now = time.monotonic()
        if self.size == 1 or now - self._last_peer_check < PEER_CHECK_SECONDS:
            return
        self._last_peer_check = now
        with self._collective():
            self._raise_if_announced()

    def _raise_if_announced(self) -> None:
        store = _default_store()
        if store.check([self._failure_key]):
            rank, message, status = json.loads(store.get(self._failure_key))
            raise PeerError(f"worker {rank} of {self.size}: {message}", status=status)

    def _cause_of(self, error: Exception) -> Exception:
        """What another worker has said, or its end, if an error only follows from that."""
        if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
            return error
        try:
            with suppress(RuntimeError):  # the key-value store may have gone with its worker
                self._raise_if_announced()
        except PeerError as told:
            return told
        is_of_connection = isinstance(error, dist.DistError) or _CONNECTION.search(str(error))
        return _lost(error) if is_of_connection else error

    @contextmanager
    def _collective(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # A connection that closes under a collective means that a worker has left. If it said
            # why, that is the cause to report.
            with suppress(RuntimeError):  # the key-value store may have gone with its worker
                self._raise_if_announced()
            raise _lost(error) from error


# What gloo says of a connection that ended, wherever it is met.
_CONNECTION = re.compile(r"gloo|[Cc]onnection (closed|reset)|Timed out waiting")


def _lost(error: Exception) -> PeerError:
    # Gloo begins with a line of its own source and ends with advice on its logs.
    cause = re.sub(r"^\[\S+:\d+\] ", "", first_line(error)).partition(". ")[0]
    return PeerError(
        f"The connection to another worker was lost ({cause}): it has ended without a word. Look "
        "for that worker's own message, or for the system ending it for memory."
    )


def was_agreed(error: BaseException) -> bool:
    """Whether every worker raised this error together, so that worker 0 can speak for all."""
    return getattr(error, _AGREED, False)


def _differ(one: Any, other: Any) -> bool:
    """Whether values differ; a NaN does not differ from a NaN."""
    return bool(one != other) and repr(one) != repr(other)


def _difference(values: Sequence[Any], other: int) -> str:
    """What differs between worker 0's value and another's: the first key, or the values."""
    one, two = values[0], values[other]
    if isinstance(one, dict) and isinstance(two, dict):
        key = next(key for key in {**one, **two} if _differ(one.get(key), two.get(key)))
        return f"{key}: {_shown(two.get(key))} and {_shown(one.get(key))}"
    return f"{_shown(two)} and {_shown(one)}"


def _shown(value: Any) -> str:
    """A value, as much of it as an error has room for."""
    text = repr(value)
    return f"{text[:100]}…" if len(text) > 100 else text


def _default_store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _buckets(tensors: Sequence[Tensor], limit_bytes: int) -> Iterator[list[Tensor]]:
    """Groups tensors of one dtype into lists of at most `limit_bytes`, keeping their order."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for group in by_dtype.values():
        bucket: list[Tensor] = []
        held = 0
        for tensor in group:
            if bucket and held + tensor.nbytes > limit_bytes:
                yield bucket
                bucket, held = [], 0
            bucket.append(tensor)
            held += tensor.nbytes
        yield bucket
