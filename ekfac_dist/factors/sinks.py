"""Where a fit puts its factors: a directory (`StoreWriter`), memory, or nowhere.

A fit writes to its sink stage by stage, and asks it at the start what is stored already, so that a
restarted run repeats no finished stage. Of a store on a disk, worker 0 has the `StoreWriter`, which
alone lists files as stored; workers that see its directory have a `FileWriter`, for files that
worker 0 then lists; all others have a `NullStore`. Sinks know file names and tensors, not how those
were computed.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ekfac_dist.factors.layout import FORMAT


@dataclass(frozen=True)
class StoredWork:
    """The work of a run that was in its store when the run was started, or started again.

    Attributes:
        files: Files that are in place and undamaged, as paths inside the store.
        records: Results of finished stages, by the stage's name.
        run_id: Identifies the run; the same each time that it is started again.
    """

    files: frozenset[str] = frozenset()
    records: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    run_id: str = ""


@dataclass(frozen=True)
class DiskNeed:
    """The disk space that a stage takes.

    Attributes:
        stage: The stage's name in errors.
        results: Size of all files that it writes, in bytes.
        files: Those files, as paths inside the store; some may be in place already.
        states: Largest size of all workers' saved states together, in bytes.
        folder: The folder of those states, inside the folder `state`.
    """

    stage: str
    results: int
    files: Iterable[str]
    states: int
    folder: str


class FactorSink(Protocol):
    """Where a run puts its factors.

    Attributes:
        writers: Ranks of the workers that can write and read files of the store, the same on every
            worker; empty if each worker keeps all factors in its memory.
    """

    writers: Collection[int]

    @property
    def will_replace(self) -> bool:
        """Whether worker 0's next file replaces another run's store; False on other workers."""

    @property
    def stored(self) -> StoredWork:
        """The work that was in the store when the run was started; the same on every worker."""

    def write(
        self, file: str, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
    ) -> None:
        """Stores one safetensors file.

        Args:
            file: Its path inside the store.
            tensors: Its tensors, by name.
            header: Strings for the file's own header.
        """

    def write_file(
        self, file: str, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Writes one safetensors file without listing it as stored; only on `writers`.

        Arguments as of `write`.

        Returns:
            Its size and SHA-256, for `list_file` on worker 0.

        Raises:
            OutputError: If it cannot be written.
        """

    def list_file(self, file: str, listed: Mapping[str, Any]) -> None:
        """Lists a file as stored that is in place, written by any worker.

        Args:
            file: Its path inside the store.
            listed: Its size and SHA-256, from `write_file`.
        """

    def require_disk_space(self, need: DiskNeed) -> None:
        """Checks, before a stage, that the disk has space for it.

        Raises:
            OutputError: If it has not.
        """

    def content_sha256(self, files: Iterable[str]) -> str:
        """SHA-256 over the contents of some stored files; "" where there are no files to resume."""

    def read(self, file: str, key: str) -> Tensor:
        """One tensor of a stored file; only on `writers`."""

    def remove(self, file: str) -> None:
        """Removes a file, if it is stored."""

    def record(self, stage: str, content: Mapping[str, Any]) -> None:
        """Stores the result of a finished stage, which a restarted run finds in `stored`.

        Args:
            stage: The stage's name.
            content: Its result, of types that JSON has.
        """

    def after_save(self) -> None:
        """Called when a worker's state of a pass is on the disk: this worker's, or another's."""

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Completes the store.

        Args:
            manifest: Every entry but format, complete and files.
        """


class NullStore:
    """The sink of workers that do not see the store's directory: it ignores everything.

    Args:
        stored: What worker 0 found in the store.
        writers: See `FactorSink`.
    """

    will_replace = False

    def __init__(self, stored: StoredWork | None = None, writers: Collection[int] = (0,)) -> None:
        self.stored, self.writers = stored or StoredWork(), writers

    def write(
        self, file: str, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
    ) -> None:
        """Ignores a file: worker 0 writes it."""

    def write_file(
        self, file: str, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Always fails: this worker does not see the store's directory."""
        raise NotImplementedError(f"{file} is another worker's to write")

    def list_file(self, file: str, listed: Mapping[str, Any]) -> None:
        """Ignores a file: worker 0 lists it."""

    def require_disk_space(self, need: DiskNeed) -> None:
        """Checks nothing: worker 0 does."""

    def content_sha256(self, files: Iterable[str]) -> str:
        """Always "": only worker 0 has the files."""
        return ""

    def read(self, file: str, key: str) -> Tensor:
        """Always fails: this worker does not see the store's directory."""
        raise NotImplementedError(f"{file} is another worker's to read")

    def remove(self, file: str) -> None:
        """Ignores a file: worker 0 removes it."""

    def record(self, stage: str, content: Mapping[str, Any]) -> None:
        """Ignores a record: worker 0 writes it."""

    def after_save(self) -> None:
        """Ignores a saved state: worker 0's sink acts on its own."""

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Ignores the manifest: worker 0 writes it."""


class MemoryStore:
    """A store in memory, written and read like one on disk.

    Attributes:
        manifest: The manifest; empty until `finish`.
    """

    stored = StoredWork()
    writers: Collection[int] = ()
    will_replace = False

    def __init__(self) -> None:
        self.manifest: dict[str, Any] = {}
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._headers: dict[str, dict[str, str]] = {}

    def write(
        self, file: str, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
    ) -> None:
        """Keeps copies of one file's tensors on the CPU."""
        self._tensors[file] = {name: t.detach().cpu().clone() for name, t in tensors.items()}
        self._headers[file] = dict(header or {})

    def write_file(
        self, file: str, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Always fails: there are no files."""
        raise NotImplementedError(f"{file} is no file of a store in memory")

    def list_file(self, file: str, listed: Mapping[str, Any]) -> None:
        """Ignores a file: there are none."""

    def require_disk_space(self, need: DiskNeed) -> None:
        """Checks nothing: no disk is used."""

    def content_sha256(self, files: Iterable[str]) -> str:
        """Always "": there are no saved states whose files could have changed."""
        return ""

    def read(self, file: str, key: str) -> Tensor:
        """One tensor of one file."""
        return self._tensors[file][key]

    def remove(self, file: str) -> None:
        """Removes a file, if it is stored."""
        self._tensors.pop(file, None)
        self._headers.pop(file, None)

    def record(self, stage: str, content: Mapping[str, Any]) -> None:
        """Ignores a record: a run in memory cannot be resumed."""

    def after_save(self) -> None:
        """Ignores the call: a run in memory has no saved states."""

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Keeps the manifest."""
        self.manifest = {"format": FORMAT, "complete": True, **manifest, "files": {}}

    def tensor(self, file: str, key: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor of one file; see `StoreReader.tensor`."""
        return self._tensors[file][key]

    def header(self, file: str) -> dict[str, str]:
        """The strings that were written with a file."""
        return self._headers[file]

    def copy_to(self, sink: FactorSink) -> None:
        """Writes everything to another store and completes it."""
        for file, tensors in self._tensors.items():
            sink.write(file, tensors, self._headers[file])
        sink.finish(
            {k: v for k, v in self.manifest.items() if k not in ("format", "complete", "files")}
        )
