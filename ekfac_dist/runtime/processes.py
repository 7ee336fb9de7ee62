"""The workers of a run, seen from one of them.

`World`, with its base classes in `collectives` and `peers`, is the only place that talks to
`torch.distributed`. Each worker does the same things in the same order, whatever their number, so
that one code path serves one worker and many. Two kinds of failure are kept apart:

* inside `World.agree` every worker learns of the failure of any, and all raise together;
* anywhere else a worker fails alone, announces it, and the others raise `PeerError`.
"""

import itertools
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ekfac_dist.errors import (
    DEFECT,
    LaunchError,
    ModelError,
    PeerError,
    Preempted,
    UserError,
    first_line,
    status_of,
)
from ekfac_dist.runtime import gpus
from ekfac_dist.runtime.collectives import Arrivals, Collectives
from ekfac_dist.runtime.groups import (
    COLLECTIVE_TIMEOUT,
    GPU_BACKENDS,
    backends,
    connect_gpus,
    control_group,
)
from ekfac_dist.runtime.out_of_memory import shortage
from ekfac_dist.runtime.peers import AGREED
from ekfac_dist.runtime.platforms import says_yes

T = TypeVar("T")

_runs = itertools.count()


def launched_processes() -> int:
    """How many workers the launcher says it started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass
class World(Collectives):
    """One worker's view of all of them; attributes as of `Peers`."""

    @classmethod
    def start(cls) -> "World":
        """Joins the process group that Accelerate's launcher describes, or works alone.

        In a script with an `Accelerator` of its own, the process group of that one is used.

        Raises:
            LaunchError: If the launcher started several workers that do not see each other.
        """
        # Accelerate's launcher does not pass a configuration's use_cpu on to several workers.
        says_cpu = says_yes("ACCELERATE_USE_CPU")
        # Other accelerators than CUDA's, such as Apple's, know no float64.
        cpu = says_cpu or not torch.cuda.is_available()
        arguments: dict[str, Any] = {}
        if launched_processes() > 1 and not dist.is_initialized():
            arguments["timeout"] = COLLECTIVE_TIMEOUT
            # A torch for GPUs that finds none is the driver's fault rather than anybody's wish.
            if torch.version.cuda and not says_cpu and not gpus.hidden_by_the_user():
                gpus.require_usable_gpu("The launcher")
            if not cpu:
                arguments["backend"] = GPU_BACKENDS
                # NCCL's own thread would end the process before it could say what failed.
                os.environ.setdefault("TORCH_NCCL_RETHROW_CUDA_ERRORS", "0")
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
        sharding = size > 1 and says_yes("ACCELERATE_USE_FSDP")
        device = state.device
        if device.type == "cpu":
            device = torch.device("cpu")  # accelerate says "cpu:0" for a worker of several
        elif device.type == "cuda" and device.index is None:
            # In a thread that uses another GPU, "cuda" would be that one.
            device = torch.device("cuda", torch.cuda.current_device())
        run = next(_runs)
        return cls(
            rank=state.process_index,
            size=size,
            local_rank=max(0, state.local_process_index),
            device=device,
            backend=backends().get(device.type, "none") if size > 1 else "none",
            fsdp=int(os.environ.get("FSDP_VERSION", "1")) if sharding else 0,
            control=control_group() if size > 1 else None,
            _failure_key=f"ekfac_dist/failure/{run}",
            _arrivals=Arrivals(f"ekfac_dist/arrivals/{run}"),
        )

    def meet(self) -> None:
        """Lets the workers' GPUs meet, so that what keeps them apart is told before any work.

        A collective.

        Raises:
            LaunchError: If workers share a GPU, or the first collective of their GPUs fails.
        """
        if self.size == 1 or self.backend != "nccl":
            return
        workers = self.gather((socket.gethostname(), *gpus.identity(self.device)))
        with self.agree():
            gpus.require_own_gpus(workers)
        connect_gpus(self.device, None, id(dist.group.WORLD))

    def at(self, device: torch.device) -> "World":
        """The same worker, computing on another device.

        Raises:
            ModelError: If the workers talk through NCCL, and the device is not this worker's GPU.
        """
        if self.backend == "nccl" and device != self.device:
            raise ModelError(
                f"The model is on {device}, and this worker's device is {self.device}, through "
                f"which workers talk (NCCL); move it there: model.to({str(self.device)!r}), or "
                "accelerator.device, on each worker."
            )
        return replace(self, device=device)

    def within(self, group: Any) -> "World":
        """The same worker among those of a group, which are in step."""
        return replace(
            self, group=group, rank=dist.get_rank(group), size=dist.get_world_size(group)
        )

    def alone(self) -> "World":
        """The same worker without the others."""
        return replace(self, rank=0, size=1)

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
        """A device mesh of one dimension over all workers."""
        return init_device_mesh(self.device.type, (self.size,))

    def close(self) -> None:
        """Leaves the process group, together with the others."""
        if self.size > 1:
            dist.destroy_process_group()

    # -- failing, and acting, together -------------------------------------------------------------

    @contextmanager
    def agree(
        self, *, takes_part: bool = True, together: tuple[type[Exception], ...] | None = None
    ) -> Iterator[None]:
        """Runs a block on every worker; if it fails on any, it fails on all.

        All raise the failing worker's sentence, with that worker's name unless all that took part
        failed with the same one. In a block without collectives every worker reaches the end, where
        they agree. In a block with collectives, such as a sharded model's forward, a worker that
        fails alone leaves the others waiting in the next one; so it announces its failure and
        raises at once.

        Args:
            takes_part: Whether this worker does something in the block.
            together: None for a block without collectives; for one with collectives the errors that
                every worker raises at the same place, so that they can be agreed on.
        """
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = (shortage(caught) or caught) if together is None else self._cause_of(caught)
            # One that was asked to end leaves a long block early, for the place where all agree.
            at_once = together is not None and isinstance(error, Preempted)
            alone = not isinstance(error, together or ()) or isinstance(error, PeerError)
            leaves = together is not None and alone
            if not isinstance(error, PeerError) and not at_once:
                self.announce_failure(error, leaves=leaves)
            if leaves:
                raise error from (None if error is caught else caught)
        report: tuple[str, str, int] | None = None
        if error is not None and not isinstance(error, PeerError):
            report = (type(error).__name__, str(error), status_of(error))
        reports = self.gather((takes_part, report))
        if any(failure is not None for _, failure in reports):
            self._failure_key += "+"  # the announced failure is dealt with
            self._raise_agreed(error if report is not None else None, reports)
        if error is not None:
            raise error

    def _raise_agreed(
        self,
        error: Exception | None,
        reports: Sequence[tuple[bool, tuple[str, str, int] | None]],
    ) -> NoReturn:
        """Raises the same sentence on every worker, that of the lowest rank that failed.

        Args:
            error: This worker's own failure.
            reports: Of each worker, whether it took part, and its failure's class, text and status.
        """
        rank, failure = next((r, failure) for r, (_, failure) in enumerate(reports) if failure)
        kind, message, status = failure
        is_defect = status == DEFECT
        all_alike = {report for took_part, report in reports if took_part} == {failure}
        if is_defect:
            message = f"{kind}: {message}"
        if not all_alike or is_defect:
            message = f"worker {rank} of {self.size}: {message}"
        if error is None:
            raised: Exception = PeerError(message, status=status)
        elif isinstance(error, UserError):
            raised = type(error)(message)
        else:
            raised = error  # a defect keeps its traceback
        setattr(raised, AGREED, True)
        if raised is error:
            raise raised
        raise raised from error

    def require_same(self, noun: str, value: object) -> None:
        """Refuses, on every worker, a value that differs between workers.

        Args:
            noun: A noun for the value, in the plural, for the error.
            value: A value that can be pickled and compared. If it is a dictionary, the error names
                the first field that differs.

        Raises:
            LaunchError: If the values differ.
        """
        values = self.gather(value)
        other = next((rank for rank, each in enumerate(values) if _differ(each, values[0])), None)
        with self.agree():
            if other is not None:
                raise LaunchError(
                    f"Worker {other} has other {noun} than worker 0 "
                    f"({_difference(values, other)}); every worker must be given the same."
                )

    def main_first(self, action: Callable[[], T]) -> T:
        """Runs `action` on each host's first worker, then on the others, which find its caches.

        If it fails on any worker, it fails on all, without waiting.
        """
        results: list[T] = []
        for is_own_turn in (self.local_rank == 0, self.local_rank != 0):
            with self.agree(takes_part=is_own_turn):
                if is_own_turn:
                    results.append(action())
        return results[0]

    def once_per_host(self, action: Callable[[], T]) -> T:
        """Runs `action` on each host's first worker alone; its result, on all workers of the host.

        If it fails on any host, it fails on all workers.
        """
        result: Any = None
        is_first = self.local_rank == 0
        with self.agree(takes_part=is_first):
            if is_first:
                result = action()
        return self.gather(result)[self.rank - self.local_rank]

    def on_main(self, action: Callable[[], T]) -> T | None:
        """Runs `action` on worker 0 alone; its result there, None on other workers.

        If it fails, it fails on all workers.
        """
        result: T | None = None
        with self.agree(takes_part=self.is_main):
            if self.is_main:
                result = action()
        return result


def _differ(one: Any, other: Any) -> bool:
    """Whether values differ; a NaN does not differ from a NaN."""
    return bool(one != other) and repr(one) != repr(other)


def _difference(values: Sequence[Any], other: int) -> str:
    """Worker `other`'s value and worker 0's, in words; of dictionaries the first that differs."""
    one, two = values[0], values[other]
    if isinstance(one, dict) and isinstance(two, dict):
        key = next(key for key in {**one, **two} if _differ(one.get(key), two.get(key)))
        return f"{key}: {_shown(two.get(key))} and {_shown(one.get(key))}"
    return f"{_shown(two)} and {_shown(one)}"


def _shown(value: Any) -> str:
    """A value's `repr`, cut to 100 characters."""
    text = repr(value)
    return f"{text[:100]}…" if len(text) > 100 else text
