"""Where a run puts its factors: a directory, memory, or nowhere (workers other than 0)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ekfac_dist.factors.layout import FORMAT


@dataclass(frozen=True)
class StoredWork:
    """What an earlier start of the same run has left.

    Attributes:
        files: Files that are in place and whole, as paths inside the store.
        records: What its stages came to, by their names.
        run_id: By what the run is known again.
    """

    files: frozenset[str] = frozenset()
    records: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    run_id: str = ""


@dataclass(frozen=True)
class DiskNeed:
    """What a stage will have on the disk.

    Attributes:
        stage: What the stage is called.
        results: Bytes of all that it writes.
        files: What that is; some of it may be in place.
        states: Bytes of the workers' saved states, at their most.
        folder: Where in the folder of states those are.
    """

    stage: str
    results: int
    files: Iterable[str]
    states: int
    folder: str


class FactorSink(Protocol):
    """Where a run puts its factors: a directory, memory, or (on other workers) nowhere."""

    @property
    def stored(self) -> StoredWork:
        """What was there already when the run started, the same on every worker."""

    def write(
        self, file: str, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
    ) -> None:
        """Takes one file's tensors."""

    def require_disk_space(self, room: DiskNeed) -> None:
        """Refuses a stage that the disk has no room for.

        Raises:
            OutputError: There is no room.
        """

    def content_sha256(self, files: Iterable[str]) -> str:
        """By what the content of some files is known again; "" on other workers than worker 0."""

    def read(self, file: str, key: str) -> Tensor:
        """One tensor of a file that is there; on worker 0 only."""

    def remove(self, file: str) -> None:
        """Gives up a file."""

    def record(self, stage: str, content: Mapping[str, Any]) -> None:
        """Takes what a stage came to."""

    def after_save(self) -> None:
        """Learns that a worker's state of a pass is on the disk."""

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Takes the manifest; the store is complete."""


class NullStore:
    """Where a worker's factors go when another worker writes the store.

    Args:
        found: What that worker found there.
    """

    def __init__(self, found: StoredWork | None = None) -> None:
        self.stored = found or StoredWork()

    def write(
        self, file: str, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
    ) -> None:
        """Does nothing."""

    def require_disk_space(self, room: DiskNeed) -> None:
        """Does nothing."""

    def content_sha256(self, files: Iterable[str]) -> str:
        """Nothing: worker 0 knows."""
        return ""

    def read(self, file: str, key: str) -> Tensor:
        """Fails: the other worker reads."""
        raise NotImplementedError(f"{file} is worker 0's to read")

    def remove(self, file: str) -> None:
        """Does nothing."""

    def record(self, stage: str, content: Mapping[str, Any]) -> None:
        """Does nothing."""

    def after_save(self) -> None:
        """Does nothing."""

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Does nothing."""


class MemoryStore:
    """A store that is kept in memory: written and read like one on disk."""

    stored = StoredWork()

    def __init__(self) -> None:
        self.manifest: dict[str, Any] = {}
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._headers: dict[str, dict[str, str]] = {}

    def write(
        self, file: str, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
    ) -> None:
        """Keeps one file's tensors, on the CPU."""
        self._tensors[file] = {name: t.detach().cpu().clone() for name, t in tensors.items()}
        self._headers[file] = dict(header or {})

    def require_disk_space(self, room: DiskNeed) -> None:
        """Does nothing: memory is planned for elsewhere."""

    def content_sha256(self, files: Iterable[str]) -> str:
        """Nothing: no run goes on from here."""
        return ""

    def read(self, file: str, key: str) -> Tensor:
        """One tensor of one file."""
        return self._tensors[file][key]

    def remove(self, file: str) -> None:
        """Gives up one file, if it is there."""
        self._tensors.pop(file, None)
        self._headers.pop(file, None)

    def record(self, stage: str, content: Mapping[str, Any]) -> None:
        """Does nothing: the run ends with the process."""

    def after_save(self) -> None:
        """Does nothing: no state of it is saved."""

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Keeps the manifest."""
        self.manifest = {"format": FORMAT, "complete": True, **manifest, "files": {}}

    def tensor(self, file: str, key: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor of one file; see `StoreReader.tensor`."""
        return self._tensors[file][key]

    def header(self, file: str) -> dict[str, str]:
        """The strings kept with one file."""
        return self._headers[file]

    def copy_to(self, sink: FactorSink) -> None:
        """Writes everything to another store and finishes it."""
        for file, tensors in self._tensors.items():
            sink.write(file, tensors, self._headers[file])
        sink.finish(
            {k: v for k, v in self.manifest.items() if k not in ("format", "complete", "files")}
        )
