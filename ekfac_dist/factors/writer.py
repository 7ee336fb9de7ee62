"""Writing a factor store: each file whole or not at all, the manifest last.

Worker 0 holds the directory's lock, lists the files that are in place, and writes those of workers
that do not see the directory. The unfinished store of a run has, beside its factor files,

    manifest.json     complete: false, the configuration, and fingerprints of the run's inputs
    journal.jsonl     one line per file that is in place and per finished stage
    state/            the running sums that workers have saved during a pass

The same run, started again, compares each file with its checksum and resumes. `layout` says what a
finished store is, `replacement` how an unfinished one takes another run's place.
"""

import hashlib
import json
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ekfac_dist.errors import OutputError, StoreError
from ekfac_dist.factors.directory import make_folders, remove, total_bytes, write_store_manifest
from ekfac_dist.factors.layout import (
    CHECKSUM,
    FOLDERS,
    FORMAT,
    MANIFEST,
    PASS_FOLDER,
    STATE,
    TEMPORARY_FILES,
    manifest_checksum,
    read_manifest,
    stored_files,
)
from ekfac_dist.factors.output import OVERWRITE_ADVICE, check_output, require_resumable
from ekfac_dist.factors.replacement import Replacement, finish_or_remove
from ekfac_dist.factors.sinks import DiskNeed, NullStore, StoredWork
from ekfac_dist.runtime.files import is_as_listed, safetensors_parts, write_listed
from ekfac_dist.runtime.journal import JOURNAL, Journal
from ekfac_dist.runtime.lock import DirectoryLock
from ekfac_dist.runtime.memory import as_text, free_disk_bytes
from ekfac_dist.runtime.resuming import require_same_beginning

# Version of an unfinished store's content; a store of another version cannot be resumed.
UNFINISHED_FORMAT = 3


class StoreWriter:
    """The sink that writes a store to a directory; on worker 0 only.

    Args:
        path: The store's directory.
        config: The run's whole configuration.
        inputs: What else must be the same for an unfinished store to be resumed: fingerprints and
            versions, by name.
        replace: Whether to replace a store that is there and cannot be resumed, as soon as
            something of this run is on the disk.

    Attributes:
        path: The store's directory.
        files: Size and SHA-256 of each file in place, by its path inside the store, as the manifest
            will list them.
        records: Results of finished stages, by the stage's name.
        stored: What was in the store at the start; without files until `drop_damaged` has checked
            them.
        writers: See `FactorSink`.

    Raises:
        OutputError: If the directory cannot be written, is being written by another run, or holds
            files that are no store; or, without `replace`, a finished store or another run's.
        StoreError: If the journal of an unfinished store is damaged, and `replace` is false.
    """

    def __init__(
        self,
        path: str | Path,
        config: Mapping[str, Any],
        inputs: Mapping[str, Any] | None = None,
        *,
        replace: bool = False,
    ) -> None:
        self.path = Path(path)
        self.writers: Collection[int] = (0,)
        self.files: dict[str, dict[str, Any]] = {}
        self.records: dict[str, dict[str, Any]] = {}
        self.stored = StoredWork()
        self._replacement: Replacement | None = None
        self._inputs = {"format": UNFINISHED_FORMAT, **(inputs or {})}
        self._config = dict(config)
        check_output(self.path, config, replace=replace)
        make_folders(self.path)
        self._lock = DirectoryLock(self.path)
        try:
            # Again, now that no other run can write: one may have done so in between.
            check_output(self.path, config, own=True, replace=replace)
            self._start(replace=replace)
        except BaseException:
            self._lock.release()
            raise

    @property
    def will_replace(self) -> bool:
        """Whether another run's store is still in place, and will be replaced by this one."""
        return self._replacement is not None and self._replacement.is_pending

    def _start(self, *, replace: bool) -> None:
        """Begins a new store, resumes the one that is there, or prepares to replace it."""
        if not (self.path / MANIFEST).exists():
            for name in (JOURNAL, STATE):
                remove(self.path / name)
            run_id = uuid.uuid4().hex
            make_folders(self.path, *FOLDERS)
            write_store_manifest(self.path, self._unfinished_manifest(run_id))
            self._resume(run_id)
            return
        try:
            require_resumable(self.path, self._config)
            manifest = read_manifest(self.path)
            require_same_beginning(
                self.path, manifest.get("begins"), self._inputs, advice=OVERWRITE_ADVICE
            )
            self._resume(str(manifest.get("run")))
        except (OutputError, StoreError):
            if not replace:
                raise
            self.stored = StoredWork(run_id=uuid.uuid4().hex)
            self._replacement = Replacement(self.path, self.stored.run_id)

    def _unfinished_manifest(self, run_id: str) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "complete": False,
            "config": self._config,
            "begins": self._inputs,
            "run": run_id,
        }

    def _resume(self, run_id: str) -> None:
        """Reads files and records of the unfinished store in place from its journal."""
        finish_or_remove(self.path, run_id)
        make_folders(self.path, *FOLDERS)
        self.stored = StoredWork(run_id=run_id)
        self._journal = Journal(self.path)
        for record in self._journal.records:
            if "stage" in record:
                self.records[record["stage"]] = record
            elif record.get("removed"):
                self.files.pop(record["file"], None)
            else:
                self.files[record["file"]] = {k: record[k] for k in ("bytes", "sha256")}

    def drop_damaged(self, on_bytes: Callable[[int], None]) -> list[str]:
        """Compares every file with its checksum, and takes damaged ones off the list of files.

        Args:
            on_bytes: Called with each file's size in bytes once it has been compared.

        Returns:
            The damaged files, as paths inside the store.
        """
        damaged = []
        for file, listed in list(self.files.items()):
            if not is_as_listed(self.path / file, listed):
                del self.files[file]
                damaged.append(file)
            on_bytes(listed["bytes"])
        self.stored = StoredWork(frozenset(self.files), dict(self.records), self.stored.run_id)
        return damaged

    def write(
        self, file: str, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
    ) -> None:
        """Writes one safetensors file; its tensors are moved to the CPU and made contiguous.

        Arguments as of `FactorSink.write`.

        Raises:
            OutputError: If it cannot be written.
        """
        if self.will_replace:
            self._replace(file, safetensors_parts(tensors, header))
        else:
            self.list_file(file, self.write_file(file, tensors, header))

    def write_file(
        self, file: str, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Writes one file of this run's own store; see `FactorSink.write_file`."""
        return _write_file(self.path, file, tensors, header)

    def list_file(self, file: str, listed: Mapping[str, Any]) -> None:
        """Lists a file in the journal; see `FactorSink.list_file`.

        Raises:
            OutputError: If the journal cannot be written.
        """
        self._journal.append({"file": file, **listed})
        self.files[file] = dict(listed)

    def after_save(self) -> None:
        """Replaces another run's store, if one is still in place."""
        if self.will_replace:
            self._replace()

    def _replace(
        self, file: str | None = None, parts: list[bytes | memoryview] | None = None
    ) -> None:
        """Replaces the other run's store by this run's unfinished one.

        Args:
            file: The first file of the new store, as a path inside it; None: it has none yet.
            parts: That file's content.

        Raises:
            OutputError: As of `Replacement.carry_out`.
        """
        assert self._replacement is not None
        manifest = self._unfinished_manifest(self.stored.run_id)
        files = self._replacement.carry_out(manifest, self.records, file, parts)
        self._journal, self.files = Journal(self.path), files

    def require_disk_space(self, need: DiskNeed) -> None:
        """Checks that the disk has space for a stage; see `FactorSink.require_disk_space`."""
        written = sum(self.files[file]["bytes"] for file in need.files if file in self.files)
        saved = 0 if self.will_replace else total_bytes(self.path / STATE / need.folder)
        states = max(0, need.states - saved)
        needed, free = max(0, need.results - written) + states, free_disk_bytes(self.path)
        if needed > free:
            of_states = ""
            if need.states:
                of_states = f", {as_text(states)} of it for saved states (save_minutes: null: none)"
            if self._replacement is not None and self._replacement.is_pending:
                raise OutputError(
                    f"The {need.stage} stage needs {as_text(needed)} on the disk of {self.path}"
                    f"{of_states}, and {as_text(free)} are free beside the store there "
                    f"({as_text(self._replacement.num_bytes)}), which stays until the first of the "
                    "new run is on the disk. Free some, remove that store, or give another output."
                )
            raise OutputError(
                f"The {need.stage} stage needs {as_text(needed)} on the disk of {self.path}"
                f"{of_states}, and {as_text(free)} are free. Free some and run the same command "
                "again, which goes on from here; or give another output."
            )

    def content_sha256(self, files: Iterable[str]) -> str:
        """SHA-256 over the contents of some files that are in place, in the order given."""
        digests = [self.files[file]["sha256"] for file in files]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    def read(self, file: str, key: str) -> Tensor:
        """One tensor of a file that is in place."""
        return _read(self.path, file, key)

    def remove(self, file: str) -> None:
        """Removes a file, if it is in place."""
        if file not in self.files:
            return
        self._journal.append({"file": file, "removed": True})
        del self.files[file]
        (self.path / file).unlink(missing_ok=True)

    def record(self, stage: str, content: Mapping[str, Any]) -> None:
        """Stores the result of a stage; that of a pass replaces another run's store."""
        if not self.will_replace:
            self._journal.append({"stage": stage, **content})
        self.records[stage] = {"stage": stage, **content}
        if self.will_replace and PASS_FOLDER.fullmatch(stage):
            self._replace()

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Writes the manifest that makes the store complete, and removes all files of the run.

        Args:
            manifest: Every entry but format, complete and files.
        """
        if self.will_replace:
            self._replace()
        for file in stored_files(self.path):
            if file not in self.files:
                (self.path / file).unlink()
        remove(self.path / STATE)
        whole = {
            "format": FORMAT,
            "complete": True,
            **manifest,
            "files": dict(sorted(self.files.items())),
        }
        whole = json.loads(json.dumps(whole, allow_nan=False))  # as a reader will get it
        write_store_manifest(self.path, whole | {CHECKSUM: manifest_checksum(whole)})
        for file_of_run in [self.path / JOURNAL, *self.path.glob(TEMPORARY_FILES)]:
            remove(file_of_run)
        self.close()

    def close(self) -> None:
        """Releases the lock; a store that was not replaced stays as it was found."""
        if self._replacement is not None and self._replacement.is_pending:
            self._replacement.give_up()
        self._replacement = None
        self._lock.release()


class FileWriter(NullStore):
    """The sink of a worker other than 0 that sees the store's directory: it writes and reads files.

    Args:
        path: The store's directory.
        stored: What worker 0 found in the store.
        writers: See `FactorSink`.
    """

    def __init__(self, path: str | Path, stored: StoredWork, writers: Collection[int]) -> None:
        super().__init__(stored, writers)
        self._path = Path(path)

    def write_file(
        self, file: str, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Writes one file, which worker 0 lists; see `FactorSink.write_file`."""
        return _write_file(self._path, file, tensors, header)

    def read(self, file: str, key: str) -> Tensor:
        """One tensor of a file that is in place."""
        return _read(self._path, file, key)


def _write_file(
    store: Path, file: str, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None
) -> dict[str, Any]:
    return write_listed(store / file, safetensors_parts(tensors, header))


def _read(store: Path, file: str, key: str) -> Tensor:
    with safe_open(store / file, framework="pt") as opened:
        return opened.get_tensor(key)
