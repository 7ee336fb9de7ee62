"""Writing a factor store: each file whole or not at all, the manifest last.

Worker 0 writes, and holds the directory's lock; see `store` for the format and for reading. An
unfinished store has, beside its files, a manifest that says what it will be, the journal of what is
done, and the workers' saved states:

    manifest.json     complete: false, config, and what the run began with
    journal.jsonl     files that are in place, and records of stages
    state/            see stages/checkpoints.py

The same run takes all that up again, after each file has been compared with its checksum.

A run that replaces another's store leaves that as it is until something of its own is on the disk:
its first file, which it puts into a folder beside, what a pass came to, or a worker's saved state.
Then, in this order,

    .next-RUN/        is given the run's folders, journal and manifest
    manifest.json     is replaced by that manifest: from here on the store is RUN's, unfinished
    .next-RUN/…       takes the place of the old folders and journal, one after the other

If that is interrupted, the next start of the same run does what is left; of another, removes it.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ekfac_dist.errors import OutputError, StoreError
from ekfac_dist.factors.layout import (
    CHECKSUM,
    FOLDERS,
    FORMAT,
    MANIFEST,
    NEXT_PREFIX,
    PASS_FOLDER,
    STATE,
    TEMPORARY_FILES,
    manifest_checksum,
    read_manifest,
    stored_files,
)
from ekfac_dist.factors.output import ADVICE, _require_own_store, check_output
from ekfac_dist.factors.sinks import DiskNeed, StoredWork
from ekfac_dist.runtime.files import (
    flush_directory,
    is_as_listed,
    safetensors_parts,
    write_listed,
    write_whole,
)
from ekfac_dist.runtime.journal import JOURNAL, Journal
from ekfac_dist.runtime.lock import DirectoryLock
from ekfac_dist.runtime.memory import as_text, free_disk_bytes
from ekfac_dist.runtime.resuming import require_same_beginning

# What an unfinished store looks like inside; one of another look cannot be gone on with.
UNFINISHED_FORMAT = 3


class StoreWriter:
    """Writes one store. Worker 0 owns it.

    Args:
        path: The store's directory.
        config: The run's whole configuration.
        begins: What else must be the same for an unfinished store to be gone on with, such as
            fingerprints, by name.
        replace: Whether a store that is there and cannot be gone on with is replaced, once the
            first of this one is on the disk; until then it stays as it is.

    Attributes:
        files: What the manifest will list, by path inside the store.
        records: Records of stages, by name.
        found: What an earlier start of this run has left, once `drop_damaged` has looked.

    Raises:
        OutputError: The directory cannot be written, is being written by another run, or holds
            files that are no store; or, unless it is to be replaced, a finished store or another
            run.
        StoreError: The journal of an unfinished store is damaged, and it is not to be replaced.
    """

    def __init__(
        self,
        path: str | Path,
        config: Mapping[str, Any],
        begins: Mapping[str, Any] | None = None,
        *,
        replace: bool = False,
    ) -> None:
        self.path = Path(path)
        self.files: dict[str, dict[str, Any]] = {}
        self.records: dict[str, dict[str, Any]] = {}
        self.stored = StoredWork()
        self._waiting: _Waiting | None = None
        self._begins = {"format": UNFINISHED_FORMAT, **(begins or {})}
        self._config = dict(config)
        check_output(self.path, config, replace=replace)
        _make(self.path)
        self._lock = DirectoryLock(self.path)
        try:
            # Again, for another run may have been quicker.
            check_output(self.path, config, own=True, replace=replace)
            self._begin(replace=replace)
        except BaseException:
            self._lock.release()
            raise

    @property
    def will_replace(self) -> bool:
        """Whether another run's store is still in this one's place."""
        return self._waiting is not None

    def _begin(self, *, replace: bool) -> None:
        if not (self.path / MANIFEST).exists():
            for left in (JOURNAL, STATE):
                _remove(self.path / left)
            run = uuid.uuid4().hex
            _make(self.path, *FOLDERS)
            self._write_manifest(self.path, self._unfinished(run))
            self._go_on(run)
            return
        try:
            _require_own_store(self.path, self._config)
            manifest = read_manifest(self.path)
            require_same_beginning(self.path, manifest.get("begins"), self._begins, advice=ADVICE)
            self._go_on(str(manifest.get("run")))
        except (OutputError, StoreError):
            if not replace:
                raise
            self.stored = StoredWork(run_id=uuid.uuid4().hex)
            self._waiting = _Waiting(_states(self.path), _bytes_in(self.path))

    def _unfinished(self, run: str) -> dict[str, Any]:
        """The manifest that a run begins with."""
        told = {"format": FORMAT, "complete": False, "config": self._config}
        return told | {"begins": self._begins, "run": run}

    def _go_on(self, run: str) -> None:
        """Takes up what is there of a run, whose store this is."""
        for left in self.path.glob(f"{NEXT_PREFIX}*"):
            if left.name == NEXT_PREFIX + run:
                _move_in(left, self.path)
            else:
                _remove(left)
        _make(self.path, *FOLDERS)
        self.stored = StoredWork(run_id=run)
        self._journal = Journal(self.path)
        for record in self._journal.records:
            if "stage" in record:
                self.records[record["stage"]] = record
            elif record.get("removed"):
                self.files.pop(record["file"], None)
            else:
                self.files[record["file"]] = {k: record[k] for k in ("bytes", "sha256")}

    def drop_damaged(self, on_bytes: Callable[[int], None]) -> list[str]:
        """Compares every file with its checksum, and gives up those that have changed.

        Args:
            on_bytes: Told the size of each file when it has been compared.

        Returns:
            The files that were given up.
        """
        lost = []
        for file, listed in list(self.files.items()):
            if not is_as_listed(self.path / file, listed):
                del self.files[file]
                lost.append(file)
            on_bytes(listed["bytes"])
        self.stored = StoredWork(frozenset(self.files), dict(self.records), self.stored.run_id)
        return lost

    def write(
        self, file: str, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
    ) -> None:
        """Writes one safetensors file.

        Args:
            file: Its path inside the store.
            tensors: What it holds; moved to the CPU and made contiguous.
            header: Strings for the file's own header.
        """
        parts = safetensors_parts(tensors, header)
        if self._waiting is not None:
            self._replace(file, parts)
            return
        listed = write_listed(self.path / file, parts)
        self._journal.append({"file": file, **listed})
        self.files[file] = listed

    def after_save(self) -> None:
        """Replaces the store that is there, if one is: a worker's state is on the disk."""
        if self._waiting is not None:
            self._replace()

    def _replace(
        self, file: str | None = None, parts: list[bytes | memoryview] | None = None
    ) -> None:
        """Puts this run's unfinished store in the place of the one that is there.

        Args:
            file: Its first file, if it has one.
            parts: What is in that.

        Raises:
            OutputError: It cannot be written. The old store is as it was; or, if its manifest has
                been replaced already, this run can be gone on with.
        """
        waiting, run = self._waiting, self.stored.run_id
        assert waiting is not None
        beside = self.path / f"{NEXT_PREFIX}{run}"
        files = {}
        try:
            _make(beside, *FOLDERS)
            (beside / JOURNAL).touch()  # even of no lines it has to replace the other's
            journal = Journal(beside)
            for stage, content in self.records.items():
                journal.append({"stage": stage, **content})
            if file is not None and parts is not None:
                files[file] = write_listed(beside / file, parts)
                journal.append({"file": file, **files[file]})
            self._write_manifest(beside, self._unfinished(run))
            (beside / MANIFEST).replace(self.path / MANIFEST)
            flush_directory(self.path)
            self._waiting = None
            for state in waiting.states:
                _remove(state)
            _move_in(beside, self.path)
            for left in self.path.glob(f"{NEXT_PREFIX}*"):
                _remove(left)
        except OSError as error:
            raise OutputError(
                f"output {self.path} cannot be overwritten: {error.strerror or error}; give "
                "another directory."
            ) from error
        self._journal, self.files = Journal(self.path), files

    def require_disk_space(self, room: DiskNeed) -> None:
        """Refuses a stage that the disk has no room for; see `FactorSink.require_disk_space`."""
        written = sum(self.files[file]["bytes"] for file in room.files if file in self.files)
        saved = 0 if self.will_replace else _bytes_in(self.path / STATE / room.folder)
        states = max(0, room.states - saved)
        needed, free = max(0, room.results - written) + states, free_disk_bytes(self.path)
        if needed > free:
            of_states = ""
            if room.states:
                of_states = f", {as_text(states)} of it for saved states (save_minutes: null: none)"
            if self._waiting is not None:
                raise OutputError(
                    f"The {room.stage} stage needs {as_text(needed)} on the disk of {self.path}"
                    f"{of_states}, and {as_text(free)} are free beside the store there "
                    f"({as_text(self._waiting.num_bytes)}), which stays until the first of the new "
                    "run is on the disk. Free some, remove that store, or give another output."
                )
            raise OutputError(
                f"The {room.stage} stage needs {as_text(needed)} on the disk of {self.path}"
                f"{of_states}, and {as_text(free)} are free. Free some and run the same command "
                "again, which goes on from here; or give another output."
            )

    def content_sha256(self, files: Iterable[str]) -> str:
        """By what the content of some files is known again."""
        digests = [self.files[file]["sha256"] for file in files]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    def read(self, file: str, key: str) -> Tensor:
        """One tensor of a file that is in place."""
        with safe_open(self.path / file, framework="pt") as opened:
            return opened.get_tensor(key)

    def remove(self, file: str) -> None:
        """Removes a file, if it is in place."""
        if file not in self.files:
            return
        self._journal.append({"file": file, "removed": True})
        del self.files[file]
        (self.path / file).unlink(missing_ok=True)

    def record(self, stage: str, content: Mapping[str, Any]) -> None:
        """Keeps what a stage came to, for the same run to go on from."""
        if self._waiting is None:
            self._journal.append({"stage": stage, **content})
        self.records[stage] = {"stage": stage, **content}
        if self._waiting is not None and PASS_FOLDER.fullmatch(stage):
            self._replace()

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Writes the manifest that makes the store complete.

        Args:
            manifest: Every entry but format, complete and files.
        """
        if self._waiting is not None:
            self._replace()
        for file in stored_files(self.path):
            if file not in self.files:
                (self.path / file).unlink()
        _remove(self.path / STATE)
        whole = {
            "format": FORMAT,
            "complete": True,
            **manifest,
            "files": dict(sorted(self.files.items())),
        }
        whole = json.loads(json.dumps(whole, allow_nan=False))  # as it will be read
        self._write_manifest(self.path, whole | {CHECKSUM: manifest_checksum(whole)})
        for left in [self.path / JOURNAL, *self.path.glob(TEMPORARY_FILES)]:
            _remove(left)
        self.close()

    def close(self) -> None:
        """Lets others write to the directory, and leaves nothing beside a store that stays."""
        if self._waiting is not None:
            for left in _states(self.path) - self._waiting.states:
                shutil.rmtree(left, ignore_errors=True)
            for folder in [*self.path.glob(f"{STATE}/*"), self.path / STATE]:
                with suppress(OSError):  # it is not there, or not empty
                    folder.rmdir()
            shutil.rmtree(self.path / f"{NEXT_PREFIX}{self.stored.run_id}", ignore_errors=True)
            self._waiting = None
        self._lock.release()

    def _write_manifest(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(folder / MANIFEST, [text.encode(), b"\n"])


@dataclass(frozen=True)
class _Waiting:
    """A store that is to be replaced.

    Attributes:
        states: Its workers' saved states.
        num_bytes: Its size.
    """

    states: set[Path]
    num_bytes: int


def _states(path: Path) -> set[Path]:
    """Every worker's saved state of every pass of a store."""
    return set(path.glob(f"{STATE}/*/*"))


def _make(path: Path, *folders: str) -> None:
    """Makes a directory, and folders in it."""
    try:
        for folder in (".", *folders):
            (path / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"output {path} cannot be made: {error.strerror or error}. Give a directory that can "
            "be written."
        ) from error


def _move_in(beside: Path, path: Path) -> None:
    """Moves a store's folders and journal to its own place, in place of what is there.

    Each step that has been done is not there to be done again.
    """
    for name in (*FOLDERS, JOURNAL):
        if (beside / name).exists():
            _remove(path / name)
            (beside / name).rename(path / name)
    shutil.rmtree(beside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _bytes_in(folder: Path) -> int:
    """Of all files in a folder, from which others may be removing some."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size
    return total
