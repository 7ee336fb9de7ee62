"""Writing a factor store: each file whole or not at all, the manifest last.

Worker 0 writes, and holds the directory's lock; see `store` for the format and for reading. An
unfinished store has, beside its files, a manifest that says what it will be, the journal of what is
done, and the workers' saved states:

    manifest.json     complete: false, config, and what the run began with
    journal.jsonl     files that are in place, and records of stages
    state/            see stages/checkpoints.py

The same run takes all that up again, after each file has been compared with its checksum.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ekfac_dist.config import leaves
from ekfac_dist.errors import OutputError, StoreError
from ekfac_dist.runtime.files import file_sha256, safetensors_parts, write_listed, write_whole
from ekfac_dist.runtime.journal import JOURNAL, Journal
from ekfac_dist.runtime.lock import LOCK, DirectoryLock, require_unlocked
from ekfac_dist.runtime.memory import as_text, free_disk_bytes
from ekfac_dist.runtime.store import (
    CHECKSUM,
    FOLDERS,
    FORMAT,
    MANIFEST,
    STATE,
    Found,
    Room,
    manifest_checksum,
    read_manifest,
    stored_files,
)

# What an unfinished store looks like inside; one of another look cannot be gone on with.
UNFINISHED_FORMAT = 3

_TEMPORARY = ".*.tmp"
_PASS = re.compile(r"(covariance|refit)-\d+(-of-\d+)?")
_ADVICE = "give another directory, or begin anew with --overwrite"


class StoreWriter:
    """Writes one store. Worker 0 owns it.

    Args:
        path: The store's directory.
        config: The run's whole configuration.
        begins: What else must be the same for an unfinished store to be gone on with, such as
            fingerprints, by name.

    Attributes:
        files: What the manifest will list, by path inside the store.
        records: Records of stages, by name.
        found: What an earlier start of this run has left, once `keep_whole` has looked.

    Raises:
        OutputError: The directory cannot be written, is being written by another run, or holds a
            finished store, another run, or files that are no store.
        StoreError: The journal of an unfinished store is damaged.
    """

    def __init__(
        self,
        path: str | Path,
        config: Mapping[str, Any],
        begins: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.files: dict[str, dict[str, Any]] = {}
        self.records: dict[str, dict[str, Any]] = {}
        self.found = Found()
        check_output(self.path, config)
        try:
            for folder in FOLDERS:
                (self.path / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"output {self.path} cannot be made: {error.strerror or error}. Give a directory "
                "that can be written."
            ) from error
        self._lock = DirectoryLock(self.path)
        try:
            self._begin(config, {"format": UNFINISHED_FORMAT, **(begins or {})})
        except BaseException:
            self._lock.release()
            raise

    def _begin(self, config: Mapping[str, Any], begins: Mapping[str, Any]) -> None:
        check_output(self.path, config, own=True)  # again: another run may have been quicker
        if (self.path / MANIFEST).exists():
            manifest = read_manifest(self.path)
            _require_same_beginning(self.path, manifest.get("begins"), begins)
            run = str(manifest.get("run"))
        else:
            run = uuid.uuid4().hex
            for left in (JOURNAL, STATE):
                _remove(self.path / left)
            told = {"format": FORMAT, "complete": False, "config": dict(config)}
            self._write_manifest(told | {"begins": begins, "run": run})
        self.found = Found(run=run)
        self._journal = Journal(self.path)
        for record in self._journal.records:
            if "stage" in record:
                self.records[record["stage"]] = record
            elif record.get("removed"):
                self.files.pop(record["file"], None)
            else:
                self.files[record["file"]] = {k: record[k] for k in ("bytes", "sha256")}

    def keep_whole(self, on_bytes: Callable[[int], None]) -> list[str]:
        """Compares every file with its checksum, and gives up those that have changed.

        Args:
            on_bytes: Told the size of each file when it has been compared.

        Returns:
            The files that were given up.
        """
        lost = []
        for file, listed in list(self.files.items()):
            path = self.path / file
            if not (
                path.is_file()
                and path.stat().st_size == listed["bytes"]
                and file_sha256(path) == listed["sha256"]
            ):
                del self.files[file]
                lost.append(file)
            on_bytes(listed["bytes"])
        self.found = Found(frozenset(self.files), dict(self.records), self.found.run)
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
        listed = write_listed(self.path / file, safetensors_parts(tensors, header))
        self._journal.append({"file": file, **listed})
        self.files[file] = listed

    def require_room(self, room: Room) -> None:
        """Refuses a stage that the disk has no room for; see `FactorSink.require_room`."""
        written = sum(self.files[file]["bytes"] for file in room.files if file in self.files)
        states = max(0, room.states - _bytes_in(self.path / STATE / room.folder))
        needed, free = max(0, room.results - written) + states, free_disk_bytes(self.path)
        if needed > free:
            of_states = ""
            if room.states:
                of_states = f", {as_text(states)} of it for saved states (save_minutes: null: none)"
            raise OutputError(
                f"The {room.stage} stage needs {as_text(needed)} on the disk of {self.path}"
                f"{of_states}, and {as_text(free)} are free. Free some and run the same command "
                "again, which goes on from here; or give another output."
            )

    def digest(self, files: Iterable[str]) -> str:
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
        self._journal.append({"stage": stage, **content})
        self.records[stage] = {"stage": stage, **content}

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Writes the manifest that makes the store complete.

        Args:
            manifest: Every entry but format, complete and files.
        """
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
        self._write_manifest(whole | {CHECKSUM: manifest_checksum(whole)})
        for left in [self.path / JOURNAL, *self.path.glob(_TEMPORARY)]:
            _remove(left)
        self.close()

    def close(self) -> None:
        """Lets others write to the directory."""
        self._lock.release()

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(self.path / MANIFEST, [text.encode(), b"\n"])


def remove_store(path: str | Path) -> None:
    """Removes a factor store, finished or not, so that a run begins anew.

    Args:
        path: The store's directory.

    Raises:
        OutputError: Something else lies there too, a run is writing it, or it cannot be removed.
    """
    path = Path(path)
    if not path.is_dir() or not _is_store(path):
        return  # nothing, or nothing of ours: `check_output` says so
    own = {*FOLDERS, STATE, JOURNAL, MANIFEST, LOCK}
    others = [e.name for e in path.iterdir() if e.name not in own and not e.match(_TEMPORARY)]
    if others:
        raise OutputError(
            f"output {path} cannot be overwritten, for it holds {others[0]} beside the store; move "
            "that away, or give another directory."
        )
    lock = DirectoryLock(path)
    try:
        # The manifest last: what is left of a store is still known to be one.
        for name in (STATE, JOURNAL, *FOLDERS, MANIFEST):
            _remove(path / name)
    except OSError as error:
        raise OutputError(
            f"output {path} cannot be overwritten: {error.strerror or error}; give another "
            "directory."
        ) from error
    finally:
        lock.release()


def check_output(path: str | Path, config: Mapping[str, Any], *, own: bool = False) -> None:
    """Refuses an output that a store could not be written to, without touching anything.

    Args:
        path: The store's directory.
        config: The run's whole configuration.
        own: Whether this process holds the directory's lock.

    Raises:
        OutputError: It cannot be written, is being written by another run, or holds anything but an
            unfinished store of this run.
    """
    path = Path(path)
    if path.is_symlink() and not path.exists():
        raise OutputError(
            f"output {path} cannot be made: it is a link to {os.readlink(path)}, which does not "
            "exist. Give another directory."
        )
    if not path.exists():
        parent = next(p for p in path.absolute().parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(
                f"output {path} cannot be made: {parent} is no directory that can be written. "
                "Give another directory."
            )
        return
    if not path.is_dir():
        raise OutputError(f"output {path} is a file; give a directory that is new or empty.")
    if not os.access(path, os.W_OK | os.X_OK):
        raise OutputError(f"output {path} cannot be written; give another directory.")
    try:
        entries = [entry for entry in path.iterdir() if not _is_from_a_false_start(entry)]
    except OSError as error:
        raise OutputError(f"output {path} cannot be read: {error.strerror}.") from error
    if entries and not (path / MANIFEST).is_file():
        raise OutputError(
            f"output {path} exists and is no factor store (it holds {entries[0].name}); give a "
            "directory that is new or empty."
        )
    if not own:
        require_unlocked(path)
    if entries:
        _require_own_store(path, config)


def _require_own_store(path: Path, config: Mapping[str, Any]) -> None:
    try:
        manifest = read_manifest(path)
    except StoreError as error:
        raise OutputError(
            f"output {path} exists, but no manifest can be read from it: {error} Give another "
            "directory, or remove this one."
        ) from error
    if manifest.get("format") != FORMAT:
        raise OutputError(
            f"output {path} exists and is no {FORMAT} store; give a directory that is new or empty."
        )
    if manifest.get("complete"):
        raise OutputError(f"output {path} holds a finished factor store already; {_ADVICE}.")
    before, now = leaves(manifest.get("config")), leaves(json.loads(json.dumps(config)))
    for field in (*_MAY_CHANGE,):
        before.pop(field, None)
        now.pop(field, None)
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        told = ", ".join(f"{n} {before.get(n)!r} (now {now.get(n)!r})" for n in changed[:4])
        raise OutputError(
            f"output {path} holds another run, unfinished and of another configuration: {told}"
            f"{', …' if len(changed) > 4 else ''}; {_ADVICE}."
        )


# Fields that a run may have another value of when it goes on: no number depends on them.
_MAY_CHANGE = ("save_minutes", "output", "model.device_map")


def _require_same_beginning(path: Path, found: Any, begins: Mapping[str, Any]) -> None:
    before = found if isinstance(found, dict) else {}
    for name in {**before, **begins}:
        old, new = before.get(name), json.loads(json.dumps(begins.get(name)))
        if old != new:
            raise OutputError(
                f"output {path} holds a run that is unfinished and began with another {name} "
                f"({_short(old)}, now {_short(new)}); {_ADVICE}."
            )


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 40 else text


def _is_store(path: Path) -> bool:
    with suppress(StoreError):
        return re.fullmatch(r"ekfac_dist/\d+", str(read_manifest(path).get("format"))) is not None
    return False


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


def _is_from_a_false_start(entry: Path) -> bool:
    """Whether it is all that a run leaves which is killed before its manifest is in place."""
    if entry.name in FOLDERS and entry.is_dir():
        return not any(entry.iterdir())
    if entry.name == STATE and entry.is_dir():  # of a host whose workers wrote nothing else
        return all(_PASS.fullmatch(inner.name) for inner in entry.iterdir())
    return entry.name == LOCK or entry.match(f".{MANIFEST}.*.tmp")
