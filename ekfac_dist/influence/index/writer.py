"""The directory of an index while shards are being made.

    manifest.json                       of the finished index; while adding, that of before
    shard-….safetensors                 each whole, if it exists
    state/begins.json                   what the run began with: it goes on only with the same
    state/worker-<rank>/journal.jsonl   a line per shard that the worker wrote, with its checksum

Every worker writes its own shards. The manifest comes last, and then the state is removed; so a run
that was ended anywhere goes on with the shards that a journal lists and that are as they were
written.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ekfac_dist.errors import OutputError
from ekfac_dist.factors.layout import (
    CHECKSUM,
    MANIFEST,
    STATE,
    TEMPORARY_FILES,
    manifest_checksum,
    read_manifest,
)
from ekfac_dist.influence.index.layout import FORMAT, Shard
from ekfac_dist.influence.results import check_new, make_directory
from ekfac_dist.runtime.files import is_as_listed, safetensors_parts, write_listed, write_whole
from ekfac_dist.runtime.journal import JOURNAL, Journal
from ekfac_dist.runtime.lock import DirectoryLock, require_unlocked
from ekfac_dist.runtime.memory import as_text, free_disk_bytes
from ekfac_dist.runtime.resuming import require_same_beginning, require_same_config

BEGINS = "begins.json"
_ADVICE = "give another output, or remove this one"
_ADVICE_ADDING = "go on with what it began, or remove its state folder, which gives that up"
# Configuration fields that may change when a run is resumed: no byte of an index depends on them.
_MAY_CHANGE = ("output", "model.device_map", "model.gradient_checkpointing")


def has_index(path: Path) -> bool:
    """Whether a directory holds an index that was finished once."""
    return (path / MANIFEST).is_file()


def check_index_output(path: Path, config: Mapping[str, Any], *, adds: bool) -> None:
    """Checks that an index can be made, or added to, in a directory; changes nothing there.

    Args:
        path: The directory.
        config: The run's whole configuration.
        adds: Whether sequences are added to an index.

    Raises:
        OutputError: If it holds something else, or a run is writing it.
    """
    begun, is_finished = _begins(path), has_index(path)
    if begun is None and not is_finished and not adds:
        check_new(path, is_left=_has_only_begun)
        return
    if adds and not is_finished:
        raise OutputError(
            f"output {path} holds no finished index to add to; leave --add out"
            f"{' to go on with the one that was begun' if begun else ''}."
        )
    require_unlocked(path)
    if begun is None:
        if not adds:
            raise OutputError(
                f"output {path} holds a finished index; give --add to add new sequences to it, or "
                "another directory."
            )
        return
    if begun["adds"] != adds:
        what, way = "that is unfinished", "leave --add out"
        if begun["adds"]:
            what, way = "to which sequences are being added", "give --add"
        raise OutputError(f"output {path} holds an index {what}; {way} to go on with that.")
    advice = _ADVICE_ADDING if adds else _ADVICE
    require_same_config(path, begun.get("config"), config, may_change=_MAY_CHANGE, advice=advice)


def _has_only_begun(entry: Path) -> bool:
    """Whether it is the state folder of a run that was ended before it said how it began."""
    if entry.name != STATE or not entry.is_dir():
        return False
    return all(one.name.startswith(f".{BEGINS}.") for one in entry.iterdir())


def _begins(path: Path) -> dict[str, Any] | None:
    """What an unfinished run began with; None if there is none."""
    try:
        begins = json.loads((path / STATE / BEGINS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_whole = isinstance(begins, dict) and isinstance(begins.get("inputs"), dict)
    return begins if is_whole and isinstance(begins.get("adds"), bool) else None


def end_what_is_finished(path: Path, data: str) -> None:
    """Removes the state of a run that was ended after its manifest was in place; on worker 0.

    Args:
        path: The directory of a finished index.
        data: Fingerprint of its data.

    Raises:
        OutputError: If another run is writing the directory.
    """
    begun = _begins(path)
    if begun is not None and begun["adds"] and begun["inputs"].get("data") == data:
        lock = DirectoryLock(path)
        shutil.rmtree(path / STATE, ignore_errors=True)
        lock.release()


class IndexDirectory:
    """The directory, on worker 0, which holds its lock.

    Args:
        path: The directory.
        config: The run's whole configuration.
        inputs: What else must be the same for a run to go on: fingerprints, versions.
        adds: Whether sequences are added to an index.

    Attributes:
        entries: The manifest's entry of each shard that is in place, by its file's name.

    Raises:
        OutputError: If the directory cannot be written, or is another run's.
    """

    def __init__(
        self, path: Path, config: Mapping[str, Any], inputs: Mapping[str, Any], *, adds: bool
    ) -> None:
        self.path, self.entries = path, dict[str, dict[str, Any]]()
        self._is_new, self._is_finished = not path.exists(), False
        make_directory(path)
        self._lock = DirectoryLock(path)
        try:
            self._start_or_resume(config, inputs, adds=adds)
        except BaseException:
            self.close()
            raise

    def _start_or_resume(
        self, config: Mapping[str, Any], inputs: Mapping[str, Any], *, adds: bool
    ) -> None:
        state = self.path / STATE
        begun = _begins(self.path)
        for file in self.path.glob(TEMPORARY_FILES):
            file.unlink(missing_ok=True)
        if begun is None:
            shutil.rmtree(state, ignore_errors=True)
            state.mkdir()
            content = json.dumps({"adds": adds, "config": config, "inputs": inputs}, indent=1)
            write_whole(state / BEGINS, [content.encode(), b"\n"])
            return
        advice = _ADVICE_ADDING if adds else _ADVICE
        require_same_beginning(self.path, begun["inputs"], inputs, advice=advice)
        for folder in sorted(state.glob("worker-*")):
            for record in Journal(folder, _damaged_journal(folder)).records:
                self.entries[record["file"]] = record

    def drop_damaged(self, on_bytes: Callable[[int], None]) -> list[str]:
        """Compares every shard in place with its checksum; files that differ are made again.

        Args:
            on_bytes: Called with each shard's size in bytes once it has been compared.

        Returns:
            Names of the damaged files.
        """
        damaged = []
        for file, entry in list(self.entries.items()):
            if not is_as_listed(self.path / file, entry):
                del self.entries[file]
                damaged.append(file)
            on_bytes(entry["bytes"])
        return damaged

    @property
    def num_bytes(self) -> int:
        """Size of the shards in place, in bytes."""
        return sum(entry["bytes"] for entry in self.entries.values())

    def require_disk_space(self, needed: int) -> None:
        """Checks that the disk has space for shards that are yet to be made, in bytes."""
        free = free_disk_bytes(self.path)
        if needed > free:
            raise OutputError(
                f"The index needs {as_text(needed)} more on the disk of {self.path}, and "
                f"{as_text(free)} are free. Free some and run the same command again, or give "
                "another output."
            )

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Writes the manifest, and removes what was needed to go on.

        Args:
            manifest: All of its entries but format and checksum.
        """
        self._is_finished = True
        whole = {"format": FORMAT, "complete": True, **manifest}
        whole[CHECKSUM] = manifest_checksum(json.loads(json.dumps(whole)))
        text = json.dumps(whole, ensure_ascii=False, allow_nan=False, indent=1)
        write_whole(self.path / MANIFEST, [text.encode(), b"\n"])
        shutil.rmtree(self.path / STATE, ignore_errors=True)

    def _unlisted(self) -> list[Path]:
        """Shards that belong to no finished index: what this run has begun to write."""
        listed = set()
        if has_index(self.path):
            listed = {entry["file"] for entry in read_manifest(self.path)["shards"]}
        return [file for file in self.path.glob("shard-*") if file.name not in listed]

    def close(self) -> None:
        """Releases the lock, after removing all of a run that has made nothing."""
        state = self.path / STATE
        made = list(state.glob(f"worker-*/{JOURNAL}"))
        if not made:
            if state.is_dir() and not self._is_finished:
                for file in self._unlisted():
                    file.unlink(missing_ok=True)
            shutil.rmtree(state, ignore_errors=True)
        self._lock.release()
        if self._is_new:
            with suppress(OSError):  # there is something in it
                self.path.rmdir()


def _damaged_journal(folder: Path) -> str:
    return f"Remove {folder}: its shards are made again."


class ShardWriter:
    """Writes one worker's shards.

    Args:
        path: The directory of the index.
        rank: The worker's rank.

    Attributes:
        entries: The manifest's entry of each shard that it has written.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self._path, self.entries = path, list[dict[str, Any]]()
        folder = path / STATE / f"worker-{rank}"
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{folder} cannot be made: {error.strerror or error}. Every worker writes its part "
                "of an index; give an output on a disk that all of them can write to."
            ) from error
        self._journal = Journal(folder, _damaged_journal(folder))

    def write(self, shard: Shard, tensors: Mapping[str, Tensor]) -> None:
        """Writes a whole shard.

        Raises:
            OutputError: If it cannot be written; shards written before stay in place.
        """
        listed = write_listed(self._path / shard.file, safetensors_parts(tensors))
        entry = {"file": shard.file, "sequences": shard.length, **listed}
        self._journal.append(entry)
        self.entries.append(entry)


def require_seen_by_all(path: Path, workers: int) -> None:
    """Refuses a directory that is another one on another worker's disk; called on worker 0.

    Args:
        path: The directory, in which every worker has made its folder.
        workers: W.

    Raises:
        OutputError: If a worker's folder is not there.
    """
    folders = [path / STATE / f"worker-{rank}" for rank in range(workers)]
    missing = [rank for rank, folder in enumerate(folders) if not folder.is_dir()]
    if missing:
        raise OutputError(
            f"output {path} is another directory for worker {missing[0]}; give one on a disk that "
            "all workers see."
        )
