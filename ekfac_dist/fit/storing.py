"""Files of the store, written and read by several workers at once.

The worker that has a file's tensors writes it, if it sees the store's directory; else it sends them
to worker 0, which writes it. No worker ever holds another's tensors beyond those of one file.

    round 1   worker 0 writes  a ┐
              worker 1 writes  b ├─> sizes and checksums ─> worker 0 lists a and b as stored
              worker 2 sends   c ───────────────────────> worker 0 writes c, and lists it
    round 2   …

A failed write loses only itself: the other files of its round are listed before all workers end.
A round may also be written by threads, while the workers go on with what they compute next. However
the workers end, the threads end before them: nothing is written once the store's lock is released.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ekfac_dist.factors.sinks import FactorSink
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.processes import World


@dataclass(frozen=True, eq=False)
class StoreFile:
    """A file to be stored.

    Attributes:
        name: Its path inside the store.
        rank: The worker that stores it.
        tensors: Its tensors, by name; used on that worker alone, unless all keep them in memory.
        header: Strings for the file's own header.
    """

    name: str
    rank: int
    tensors: Mapping[str, Tensor]
    header: Mapping[str, str] | None = None


@dataclass(frozen=True)
class _Begun:
    """A round of files that threads write.

    Attributes:
        files: The files of all workers.
        writing: The size and checksum of this worker's file, once it is written; None: it has none.
        then: Called on all workers once the files are listed.
    """

    files: Sequence[StoreFile]
    writing: Future[dict[str, Any]] | None
    then: Callable[[], None]


@dataclass
class Storing:
    """Writes and reads files of the store; its methods are collectives of all workers.

    Attributes:
        world: The workers.
        sink: This worker's sink.
    """

    world: World
    sink: FactorSink
    _may_replace: bool = field(default=True, init=False)  # until worker 0 says otherwise
    _begun: _Begun | None = field(default=None, init=False)
    _thread: ThreadPoolExecutor | None = field(default=None, init=False)

    def put(self, files: Iterable[StoreFile]) -> None:
        """Stores files, in rounds of one a worker.

        Args:
            files: The files, the same in the same order on every worker but for their tensors.

        Raises:
            OutputError: If a worker cannot write; on every worker.
            Preempted: If SIGTERM has come; what is listed is stored.
        """
        by_rank: dict[int, list[StoreFile]] = {}
        for file in files:
            by_rank.setdefault(file.rank, []).append(file)
        for number in range(max(map(len, by_rank.values()), default=0)):
            self._put_round([own[number] for own in by_rank.values() if number < len(own)])

    def begin(self, files: Sequence[StoreFile], then: Callable[[], None]) -> None:
        """Begins to store files, and lists those that were begun before; `finish` lists the last.

        Args:
            files: As of `put`, one a worker at most; their tensors may not change until then.
            then: Called on all workers once the files are stored.

        Raises:
            OutputError: If a worker could not write one of the last files, or these where they
                cannot be written meanwhile; on every worker.
        """
        before = self._begun
        if self._written_by_workers(files) == list(files):
            own, writing = self._own(files), None
            if own is not None:
                self._thread = self._thread or ThreadPoolExecutor(1, "store")
                given = own.name, own.tensors, own.header
                writing = self._thread.submit(self.sink.write_file, *given)
            self._begun = _Begun(files, writing, then)
            self._end(before)
            return
        self.finish()
        self.put(files)
        then()

    def finish(self) -> None:
        """Waits until the files that were begun are written, and lists them.

        Raises:
            OutputError: If a worker could not write; on every worker.
        """
        begun, self._begun = self._begun, None
        self._end(begun)

    def wait(self) -> None:
        """Waits until this worker's thread writes no more, and lists nothing; no collective."""
        self._begun = None
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _end(self, begun: _Begun | None) -> None:
        if begun is None:
            return
        entry: dict[str, Any] | None = None
        error: Exception | None = None
        try:
            if begun.writing is not None:
                entry = begun.writing.result()
        except Exception as caught:
            error = caught
        self._list(begun.files, entry, error)
        begun.then()

    def _written_by_workers(self, files: Sequence[StoreFile]) -> list[StoreFile]:
        """The files that their own workers write; the others go through worker 0."""
        if not self.sink.writers:
            return []
        self._may_replace = self._may_replace and self.world.share(self.sink.will_replace)
        # The first file of a store that replaces another is worker 0's to write.
        return [f for f in files if f.rank in self.sink.writers and not self._may_replace]

    def _own(self, files: Sequence[StoreFile]) -> StoreFile | None:
        """This worker's file."""
        return next((file for file in files if file.rank == self.world.rank), None)

    def _put_round(self, files: Sequence[StoreFile]) -> None:
        world, sink = self.world, self.sink
        if not sink.writers:
            with world.agree():
                for file in files:
                    sink.write(file.name, file.tensors, file.header)
            return
        written = self._written_by_workers(files)
        own = self._own(written)
        entry: dict[str, Any] | None = None
        error: Exception | None = None
        try:
            preemption.end_if_requested()
            if own is not None:
                entry = sink.write_file(own.name, own.tensors, own.header)
        except Exception as caught:
            error = caught
        self._list(written, entry, error)
        for file in files:
            if file not in written:
                tensors = world.moved(file.tensors, file.rank, 0)
                with world.agree(takes_part=world.is_main):
                    sink.write(file.name, tensors, file.header)

    def _list(
        self, written: Sequence[StoreFile], entry: dict[str, Any] | None, error: Exception | None
    ) -> None:
        """Lists files that workers have written, and raises an error of any afterwards.

        Args:
            written: The files.
            entry: Size and checksum of this worker's file, if it wrote one.
            error: This worker's error.
        """
        world, sink = self.world, self.sink
        alone = all(file.rank == 0 for file in written)
        entries = [entry] if alone else world.gather(entry)
        with world.agree(takes_part=self._own(written) is not None or world.is_main):
            for file in written if world.is_main else ():
                listed = entries[file.rank]
                if listed is not None:
                    sink.list_file(file.name, listed)
            if error is not None:
                raise error

    def read(
        self,
        keys: Mapping[str, Sequence[str]],
        readers: Mapping[str, int],
        take: Callable[[str, Mapping[str, Tensor]], None],
    ) -> None:
        """Reads stored files, each for one worker.

        Args:
            keys: The tensors that are read of each file, by its path inside the store.
            readers: The rank of the worker that gets them.
            take: Called on that worker with each file and its tensors.
        """
        world, sink = self.world, self.sink

        def stored(file: str) -> dict[str, Tensor]:
            return {key: sink.read(file, key) for key in keys[file]}

        with world.agree():
            for file, rank in readers.items():
                if rank == world.rank and rank in sink.writers:
                    take(file, stored(file))
        for file, rank in readers.items():
            if rank in sink.writers:
                continue
            tensors: Mapping[str, Tensor] = {}
            with world.agree(takes_part=world.is_main):
                if world.is_main:
                    tensors = stored(file)
            tensors = world.moved(tensors, 0, rank)
            if rank == world.rank:
                take(file, tensors)
