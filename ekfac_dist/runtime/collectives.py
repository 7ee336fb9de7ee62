"""Collectives: what every worker calls, in the same order.

A collective of `torch.distributed` has a time-out, and one worker's work may take longer. So while
a heartbeat watches the workers (see `heartbeat`), each counts itself in the key-value store first,
and whoever is early waits there for as long as the others live; the collective itself is then
short.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.peers import LEFT, PEER_CHECK_SECONDS, Peers, default_store

T = TypeVar("T")

BUCKET_BYTES = 64 * 2**20
LEAVING_SECONDS = 5.0  # how long a worker that SIGTERM has come to still waits for others
GLOO_SECONDS = 0.002
_HOST = torch.device("cpu")
# Who waits for others looks again after 1/20 of the time that it has waited, within these limits.
_WAIT_SECONDS = (0.0002, 0.5)


@dataclass
class Arrivals:
    """A count of the workers that have arrived before collectives, in the key-value store.

    Attributes:
        key: The counter's key.
        number: How often this worker has arrived.
        are_watched: Whether a heartbeat notices workers that end; else nobody waits here.
        may_leave: Whether a worker that SIGTERM has come to leaves if others do not arrive soon.
    """

    key: str = ""
    number: int = 0
    are_watched: bool = False
    may_leave: bool = True


@dataclass
class Collectives(Peers):
    """One worker of several, and its collectives with the others.

    Attributes:
        group: The process group of its collectives, if it is one of a part of the workers, which
            are in step: none waits for another's work. None: all workers.
        control: The group of all workers for objects and for tensors on the CPU, if it is another
            than that of tensors on the workers' devices. What workers tell each other must not
            stand behind work of a GPU, which may have failed for good.
    """

    group: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None
    _arrivals: Arrivals = field(default_factory=Arrivals, repr=False)  # the same in `at`'s copies

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Declares that a heartbeat notices workers that end, so that waits need no limit.

        Every worker enters and leaves it between the same collectives.
        """
        before, self._arrivals.are_watched = self._arrivals.are_watched, True
        try:
            yield
        finally:
            self._arrivals.are_watched = before

    @contextmanager
    def leaving_together(self) -> Iterator[None]:
        """Declares that the workers agree on when to end: none leaves by itself on SIGTERM."""
        before, self._arrivals.may_leave = self._arrivals.may_leave, False
        try:
            yield
        finally:
            self._arrivals.may_leave = before

    def wait_for_all(self) -> None:
        """Waits until every worker has arrived, without limit; returns at once if none is watched.

        Every collective of this class begins with it.

        Raises:
            PeerError: If a worker will never arrive, because it failed or was lost.
            Preempted: If SIGTERM has come, and a worker has not arrived a few seconds later: it was
                asked to end too, or is lost. Not while the workers leave together.
        """
        if self.size == 1 or self.group is not None or not self._arrivals.are_watched:
            return
        arrivals, store = self._arrivals, default_store()
        arrivals.number += 1  # no worker arrives again before all have, so one counter is enough
        start = last_look = time.monotonic()
        asked_to_end: float | None = None
        shortest, longest = _WAIT_SECONDS
        with self._collective():
            arrived = store.add(arrivals.key, 1)
            while arrived < arrivals.number * self.size:
                now = time.monotonic()
                if now - last_look >= PEER_CHECK_SECONDS:
                    last_look = now
                    if store.check([self._failure_key + LEFT]):
                        self._raise_if_announced()
                if arrivals.may_leave and asked_to_end is None and preemption.requested():
                    asked_to_end = now
                if asked_to_end is not None and now - asked_to_end > LEAVING_SECONDS:
                    raise preemption.ended("what is done is stored")
                time.sleep(min(longest, max(shortest, (now - start) / 20)))
                arrived = store.add(arrivals.key, 0)

    def _group_for(self, device: torch.device) -> dist.ProcessGroup | None:
        """The group for tensors of a device; of the CPU, for objects too. None: the default one."""
        if self.group is None and device.type == "cpu":
            return self.control
        return self.group

    def gather(self, value: T) -> list[T]:
        """Every worker's `value`, in rank order, on every worker."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self.wait_for_all()
        with self._collective():
            dist.all_gather_object(values, value, self._group_for(_HOST))
        # gloo's thread frees what it sent only now, and needs the interpreter for it; a script that
        # ended this very moment would be aborted (torch 2.13).
        time.sleep(GLOO_SECONDS)
        return values

    def share(self, value: T) -> T:
        """Worker 0's `value`, on every worker."""
        if self.size == 1:
            return value
        box: list[Any] = [value if self.is_main else None]
        self.wait_for_all()
        with self._collective():
            dist.broadcast_object_list(box, group=self._group_for(_HOST), group_src=0)
        return box[0]

    def broadcast_(self, tensor: Tensor, *, source: int = 0) -> Tensor:
        """Overwrites `tensor` in place with one worker's; shapes and dtypes must agree."""
        if self.size > 1:
            self.wait_for_all()
            with self._collective():
                dist.broadcast(tensor, group=self._group_for(tensor.device), group_src=source)
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
                dist.all_reduce(flat, group=self._group_for(flat.device))
            if alone:
                continue
            parts = flat.split([t.numel() for t in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def begin_sum(self, numbers: Sequence[int]) -> Callable[[], list[int]]:
        """Begins to add up a few whole numbers over all workers, each of which may be late.

        Returns:
            Waits for the sums.
        """
        total = torch.tensor(numbers)
        if self.size == 1:
            return total.tolist
        with self._collective():
            work = dist.all_reduce(total, group=self._group_for(_HOST), async_op=True)
        assert work is not None

        def sums() -> list[int]:
            self.wait(work)
            return total.tolist()

        return sums

    def moved(
        self, tensors: Mapping[str, Tensor], source: int, target: int
    ) -> Mapping[str, Tensor]:
        """One worker's tensors, on another worker; empty on the others.

        Args:
            tensors: The tensors; used on the worker that has them alone.
            source: Its rank.
            target: The rank of the worker that gets them.
        """
        if source == target or self.rank not in (source, target):
            return tensors if self.rank == target else {}
        shapes: list[Any] = [[(name, t.shape, t.dtype) for name, t in tensors.items()]]
        with self._collective():
            if self.rank == source:
                dist.send_object_list(shapes, dst=target, group=self._group_for(_HOST))
                for tensor in tensors.values():
                    dist.send(tensor.contiguous().to(self.device), dst=target)
                return {}
            dist.recv_object_list(shapes, src=source, group=self._group_for(_HOST))
            arrived = {}
            for name, shape, dtype in shapes[0]:
                arrived[name] = torch.empty(shape, dtype=dtype, device=self.device)
                dist.recv(arrived[name], src=source)
            return arrived

    def all_to_all(
        self,
        arriving: Tensor,
        leaving: Tensor,
        arriving_sizes: Sequence[int],
        leaving_sizes: Sequence[int],
    ) -> dist.Work:
        """Begins to send a part of a tensor to each worker, and to receive theirs.

        Args:
            arriving: Takes what the others send; not to be read before `wait`.
            leaving: What is sent; not to be changed before `wait`.
            arriving_sizes: Elements from each worker, in rank order.
            leaving_sizes: Elements for each worker.
        """
        sizes = list(arriving_sizes), list(leaving_sizes)
        with self._collective():
            work = dist.all_to_all_single(arriving, leaving, *sizes, self.group, async_op=True)
        assert work is not None
        return work

    def wait(self, work: dist.Work) -> None:
        """Waits for the end of what was begun."""
        with self._collective():
            work.wait()

    def barrier(self) -> None:
        """Waits until every worker is here."""
        self.gather(None)


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
