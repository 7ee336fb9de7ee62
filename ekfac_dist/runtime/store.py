"""The factor store: safetensors files and one JSON manifest in a directory.

    manifest.json
    covariance/<factor>.safetensors    sum          [n, n]  raw sum; header: count
    eigenbasis/<factor>.safetensors    eigenvectors [n, n]  in columns; eigenvalues [n] ascending
    spectrum/<module>.safetensors      lambda       [O, I]  Λ

Of a factor of several blocks on its diagonal the keys end in .0, .1, …, a block each. The manifest
lists each file with its size and SHA-256, and says `complete: true` only once all of
them are in place. This module has the names and the reading, `store_writer` the writing. They know
names, bytes and tensors; they know no mathematics.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ekfac_dist.errors import StoreError, first_line
from ekfac_dist.runtime.files import file_sha256

FORMAT = "ekfac_dist/1"
MANIFEST = "manifest.json"
FOLDERS = ("covariance", "eigenbasis", "spectrum")
STATE = "state"
MANIFEST_KEYS = (
    "model",
    "data",
    "fisher",
    "modules",
    "coverage",
    "passes",
    "files",
    "software",
    "config",
)
CHECKSUM = "checksum"
MEND = "Copy the store again, or fit the factors again."


def covariance_file(factor: str) -> str:
    """Path, inside a store, of a factor's raw sum."""
    return f"covariance/{factor}.safetensors"


def eigenbasis_file(factor: str) -> str:
    """Path, inside a store, of a factor's eigenvectors and eigenvalues."""
    return f"eigenbasis/{factor}.safetensors"


def spectrum_file(module: str) -> str:
    """Path, inside a store, of a module's Λ."""
    return f"spectrum/{module}.safetensors"


def block_keys(key: str, number: int) -> list[str]:
    """Names, in a file, of a factor's blocks on its diagonal; of one that is whole, the key."""
    return [key] if number == 1 else [f"{key}.{k}" for k in range(number)]


def stored_files(store: Path) -> list[str]:
    """Every file in a store's folders, as a path inside the store."""
    found = [p for folder in FOLDERS for p in (store / folder).rglob("*") if p.is_file()]
    return sorted(str(path.relative_to(store)) for path in found)


@dataclass(frozen=True)
class Found:
    """What an earlier start of the same run has left.

    Attributes:
        files: Files that are in place and whole, as paths inside the store.
        records: What its stages came to, by their names.
        run: By what the run is known again.
    """

    files: frozenset[str] = frozenset()
    records: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    run: str = ""


@dataclass(frozen=True)
class Room:
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
    def found(self) -> Found:
        """What was there already when the run started, the same on every worker."""

    def write(
        self, file: str, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
    ) -> None:
        """Takes one file's tensors."""

    def require_room(self, room: Room) -> None:
        """Refuses a stage that the disk has no room for.

        Raises:
            OutputError: There is no room.
        """

    def digest(self, files: Iterable[str]) -> str:
        """By what the content of some files is known again; "" on other workers than worker 0."""

    def read(self, file: str, key: str) -> Tensor:
        """One tensor of a file that is there; on worker 0 only."""

    def remove(self, file: str) -> None:
        """Gives up a file."""

    def record(self, stage: str, content: Mapping[str, Any]) -> None:
        """Takes what a stage came to."""

    def state_saved(self) -> None:
        """Learns that a worker's state of a pass is on the disk."""

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Takes the manifest; the store is complete."""


class NoStore:
    """Where a worker's factors go when another worker writes the store.

    Args:
        found: What that worker found there.
    """

    def __init__(self, found: Found | None = None) -> None:
        self.found = found or Found()

    def write(
        self, file: str, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
    ) -> None:
        """Does nothing."""

    def require_room(self, room: Room) -> None:
        """Does nothing."""

    def digest(self, files: Iterable[str]) -> str:
        """Nothing: worker 0 knows."""
        return ""

    def read(self, file: str, key: str) -> Tensor:
        """Fails: the other worker reads."""
        raise NotImplementedError(f"{file} is worker 0's to read")

    def remove(self, file: str) -> None:
        """Does nothing."""

    def record(self, stage: str, content: Mapping[str, Any]) -> None:
        """Does nothing."""

    def state_saved(self) -> None:
        """Does nothing."""

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Does nothing."""


def read_manifest(path: Path) -> dict[str, Any]:
    """A store's manifest, as it is.

    Args:
        path: The store's directory.

    Raises:
        StoreError: It cannot be read, or is no JSON object.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"{path / MANIFEST} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path / MANIFEST} is not JSON: {first_line(error)}.") from error
    if not isinstance(manifest, dict):
        raise StoreError(f"{path / MANIFEST} is no JSON object.")
    return manifest


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what a manifest says, but for its own checksum, however it is laid out."""
    said = {key: value for key, value in manifest.items() if key != CHECKSUM}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class StoreReader:
    """Reads a complete store, file by file, when each is needed.

    Args:
        path: The store's directory.
        verify: Whether to check a file's SHA-256 before it is read for the first time.

    Raises:
        StoreError: It is missing, of another format, or incomplete.
    """

    def __init__(self, path: str | Path, *, verify: bool = False) -> None:
        self.path = Path(path)
        self._verify = verify
        self._verified: set[str] = set()
        if not self.path.is_dir():
            raise StoreError(f"{path} is no directory; give the output of an `estimate` run.")
        if not (self.path / MANIFEST).is_file():
            raise StoreError(
                f"{path} has no {MANIFEST}; give the output directory of an `estimate` run."
            )
        try:
            self.manifest = read_manifest(self.path)
        except StoreError as error:
            raise StoreError(f"{error} {MEND}") from error
        found = self.manifest.get("format")
        if found != FORMAT:
            raise StoreError(
                f"{path} has format {found!r}; this version reads {FORMAT!r}, the output of an "
                "`estimate` run."
            )
        if self.manifest.get("complete") is not True:
            raise StoreError(
                f"{path} is incomplete: its run did not finish. Run `estimate` again with the same "
                "configuration."
            )
        missing = [key for key in MANIFEST_KEYS if not isinstance(self.manifest.get(key), dict)]
        if missing:
            raise StoreError(f"{self.path / MANIFEST} lacks {', '.join(missing)}. {MEND}")
        for file, listed in self.manifest["files"].items():
            if not _is_listing(file, listed):
                raise StoreError(
                    f"{self.path / MANIFEST} lists {file!r} as {listed!r}; it must list files in "
                    f"{', '.join(FOLDERS)}, each with its bytes and sha256. {MEND}"
                )
        if CHECKSUM not in self.manifest:
            raise StoreError(
                f"{self.path / MANIFEST} is damaged or was edited: it has no {CHECKSUM} of what it "
                f"says. {MEND}"
            )
        if self.manifest[CHECKSUM] != manifest_checksum(self.manifest):
            raise StoreError(
                f"{self.path / MANIFEST} is damaged: what it says has changed since it was "
                f"written. {MEND}"
            )

    @contextmanager
    def open(self, file: str) -> Iterator[Any]:
        """Opens one file, memory-mapped, after checking that the manifest lists it and its size.

        Args:
            file: Its path inside the store.

        Raises:
            StoreError: It is not listed, missing, damaged, or no safetensors file.
        """
        path = self.check(file)
        if self._verify and file not in self._verified:
            if file_sha256(path) != self.manifest["files"][file]["sha256"]:
                raise StoreError(
                    f"{path} is damaged: its SHA-256 is not the one in the manifest. {MEND}"
                )
            self._verified.add(file)
        try:
            with safe_open(path, framework="pt") as opened:
                yield opened
        except (SafetensorError, OSError) as error:
            raise StoreError(
                f"{path} is no whole safetensors file: {first_line(error)}. {MEND}"
            ) from error

    def check(self, file: str) -> Path:
        """Where a file is, if the manifest lists it and it is there with the right size.

        Raises:
            StoreError: It is not.
        """
        listed = self.manifest["files"].get(file)
        if listed is None:
            raise StoreError(f"{self.path} does not list {file} in its manifest. {MEND}")
        path = self.path / file
        try:
            found = path.stat().st_size
        except OSError as error:
            raise StoreError(f"{path} is missing, though the manifest lists it. {MEND}") from error
        if found != listed["bytes"]:
            raise StoreError(
                f"{path} has {found} bytes; the manifest says {listed['bytes']}: it is damaged. "
                f"{MEND}"
            )
        return path

    def tensor(self, file: str, key: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor of one file.

        Args:
            file: The file's path inside the store.
            key: The tensor's name.
            shape: The shape that it must have.

        Raises:
            StoreError: The file or the tensor is not as the manifest says.
        """
        with self.open(file) as opened:
            if key not in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                raise StoreError(f"{self.path / file} holds no tensor {key!r}. {MEND}")
            tensor = opened.get_tensor(key)
        if tuple(tensor.shape) != shape:
            raise StoreError(
                f"{self.path / file}: {key} has shape {list(tensor.shape)}; the manifest's modules "
                f"say {list(shape)}. {MEND}"
            )
        if tensor.dtype not in (torch.float32, torch.float64):
            raise StoreError(
                f"{self.path / file}: {key} is {tensor.dtype}; float32 or float64 only. {MEND}"
            )
        return tensor

    def header(self, file: str) -> dict[str, str]:
        """The strings in one file's header."""
        with self.open(file) as opened:
            return dict(opened.metadata() or {})

    def verify(self) -> Iterator[tuple[str, str | None]]:
        """Checks every listed file's size and SHA-256, and that nothing else lies in the store.

        Yields:
            (file, None) for a good file, (file, what is wrong) for a bad one.
        """
        for file, listed in self.manifest["files"].items():
            path = self.path / file
            if not path.is_file():
                yield file, "is missing"
            elif path.stat().st_size != listed["bytes"]:
                yield file, f"has {path.stat().st_size} bytes, not {listed['bytes']}"
            elif file_sha256(path) != listed["sha256"]:
                yield file, "has another SHA-256: its content has changed"
            else:
                yield file, None
        for file in stored_files(self.path):
            if file not in self.manifest["files"]:
                yield file, "is not listed in the manifest"

    def total_bytes(self) -> int:
        """Size of all files, the manifest included."""
        listed = sum(entry["bytes"] for entry in self.manifest["files"].values())
        return listed + (self.path / MANIFEST).stat().st_size


def _is_listing(file: str, listed: object) -> bool:
    """Whether it tells a file inside the store, its size and its SHA-256."""
    parts = PurePosixPath(file).parts
    return (
        len(parts) > 1
        and parts[0] in FOLDERS
        and ".." not in parts
        and isinstance(listed, dict)
        and isinstance(listed.get("bytes"), int)
        and isinstance(listed.get("sha256"), str)
    )


class MemoryStore:
    """A store that is kept in memory: written and read like one on disk."""

    found = Found()

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

    def require_room(self, room: Room) -> None:
        """Does nothing: memory is planned for elsewhere."""

    def digest(self, files: Iterable[str]) -> str:
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

    def state_saved(self) -> None:
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
