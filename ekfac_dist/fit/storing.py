"""Files of the store, written and read by several workers at once.

The worker that has a file's tensors writes it, if it sees the store's directory; else it sends them
to worker 0, which writes it. No worker ever holds another's tensors beyond those of one file.

    round 1   worker 0 writes  a ┐
              worker 1 writes  b ├─> sizes and checksums ─> worker 0 lists a and b as stored
              worker 2 sends   c ───────────────────────> worker 0 writes c, and lists it
    round 2   …

A failed write loses only itself: the other files of its round are listed before all workers end.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
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

    def _put_round(self, files: Sequence[StoreFile]) -> None:
        world, sink = self.world, self.sink
        if not sink.writers:
            with world.agree():
                for file in files:
                    sink.write(file.name, file.tensors, file.header)
            return
        self._may_replace = self._may_replace and world.share(sink.will_replace)
        # The first file of a store that replaces another is worker 0's to write.
        written = [f for f in files if f.rank in sink.writers and not self._may_replace]
        own = next((file for file in written if file.rank == world.rank), None)
        entry: dict[str, Any] | None = None
        error: Exception | None = None
        try:
            preemption.end_if_requested()
            if own is not None:
                entry = sink.write_file(own.name, own.tensors, own.header)
        except Exception as caught:  # raised below, once the files of the others are listed
            error = caught
        alone = all(file.rank == 0 for file in written)
        entries = [entry] if alone else world.gather(entry)
        with world.agree(takes_part=own is not None or world.is_main):
            for file in written if world.is_main else ():
                listed = entries[file.rank]
                if listed is not None:
                    sink.list_file(file.name, listed)
            if error is not None:
                raise error
        for file in files:
            if file not in written:
                tensors = world.moved(file.tensors, file.rank, 0)
                with world.agree(takes_part=world.is_main):
                    sink.write(file.name, tensors, file.header)

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
