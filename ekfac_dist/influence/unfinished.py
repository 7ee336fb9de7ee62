"""The format of a directory of unfinished results, from which the same run can be resumed.

    manifest.json               complete: false, the configuration, and the run's inputs
                                (fingerprints, damping, versions)
    journal.jsonl               one line per finished piece of the work: piece, bytes, sha256
    state/<piece>.safetensors   the tensors of a finished piece

Worker 0 writes and reads the directory, and holds its lock. A run that ends before it has finished
a piece leaves nothing. This module knows files; `saved_blocks` says what the pieces are.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ekfac_dist.errors import OutputError, first_line
from ekfac_dist.factors.layout import STATE
from ekfac_dist.influence import results
from ekfac_dist.influence.results import (
    ResultsWriter,
    check_new,
    make_directory,
    write_results_manifest,
)
from ekfac_dist.runtime.files import is_as_listed, safetensors_parts, write_listed
from ekfac_dist.runtime.journal import JOURNAL, Journal
from ekfac_dist.runtime.lock import DirectoryLock, require_unlocked
from ekfac_dist.runtime.memory import as_text, free_disk_bytes
from ekfac_dist.runtime.resuming import require_same_beginning, require_same_config

# Version of the pieces' content; a run with pieces of another version cannot be resumed.
UNFINISHED_FORMAT = 2

_ADVICE = "give another directory, or remove this one"
# Configuration fields that may change when a run is resumed: no score depends on them.
_MAY_CHANGE = ("output", "model.device_map", "model.gradient_checkpointing", "scores.shard")
_RESULTS = (
    results.QUERIES,
    results.SCORES,
    results.TOP,
    results.BOTTOM,
    results.DETAILS,
    results.SEQUENCES,
)


class UnfinishedResults:
    """The directory of one run of `query` until its results are complete; on worker 0 only.

    Args:
        path: The directory: new, empty, or with unfinished results of the same run.
        config: The run's whole configuration.
        inputs: What else must be the same for a run to be resumed: fingerprints, damping and
            versions, by name.

    Attributes:
        path: The directory.
        pieces: Size and SHA-256 of each piece that is in place, by the piece's name.

    Raises:
        OutputError: If the directory cannot be written, is being written by another run, or holds
            another run, finished results, or anything else.
        StoreError: If its journal is damaged.
    """

    def __init__(
        self, path: str | Path, config: Mapping[str, Any], inputs: Mapping[str, Any]
    ) -> None:
        self.path = Path(path)
        self.pieces: dict[str, dict[str, Any]] = {}
        self._may_empty = False  # whether `close` may remove what an unfinished run leaves
        self._new_directories = [p for p in (self.path, *self.path.parents) if not p.exists()]
        check_results_output(self.path, config)
        make_directory(self.path)
        self._lock = DirectoryLock(self.path)
        try:
            self._start_or_resume(config, {"format": UNFINISHED_FORMAT, **inputs})
        except BaseException:
            self.close()
            raise

    def _start_or_resume(self, config: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        # Again, now that no other run can write: one may have done so in between.
        check_results_output(self.path, config, own=True)
        manifest = _unfinished_manifest(self.path)
        if manifest is not None:
            require_same_beginning(self.path, manifest.get("begins"), inputs, advice=_ADVICE)
        self._may_empty = manifest is None
        if manifest is None:
            write_results_manifest(
                self.path, {"complete": False, "config": config, "begins": inputs}
            )
        for file in _RESULTS:  # left by a start that failed while it wrote the results
            (self.path / file).unlink(missing_ok=True)
        self._journal = Journal(self.path, "Remove the directory, or give another output.")
        for record in self._journal.records:
            listed = {key: record[key] for key in ("bytes", "sha256")}
            self.pieces[record["piece"]] = listed
        self._may_empty = True

    def drop_damaged(self, on_bytes: Callable[[int], None]) -> list[str]:
        """Compares every piece with its checksum, and takes damaged ones off the list of pieces.

        Args:
            on_bytes: Called with each piece's size in bytes once it has been compared.

        Returns:
            The damaged files, as paths inside the directory.
        """
        damaged = []
        for piece, listed in list(self.pieces.items()):
            if not is_as_listed(self._file(piece), listed):
                del self.pieces[piece]
                damaged.append(str(self._file(piece).relative_to(self.path)))
            on_bytes(listed["bytes"])
        return damaged

    def require_disk_space(self, result_bytes: int, state_bytes: int) -> None:
        """Checks that the disk has space for the rest of the run.

        Args:
            result_bytes: Size of the results, in bytes.
            state_bytes: Size of all pieces together, of those in place too, in bytes.

        Raises:
            OutputError: If it has not.
        """
        states = max(0, state_bytes - sum(listed["bytes"] for listed in self.pieces.values()))
        needed, free = result_bytes + states, free_disk_bytes(self.path)
        if needed > free:
            raise OutputError(
                f"The answer needs {as_text(needed)} on the disk of {self.path}, "
                f"{as_text(states)} of it for what is kept until the end, and {as_text(free)} are "
                "free. Free some and run the same command again, or give another output."
            )

    def write(self, piece: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes a finished piece.

        Args:
            piece: Its name.
            tensors: Its tensors, by name.

        Raises:
            OutputError: If it cannot be written; pieces written before stay in place.
        """
        make_directory(self.path / STATE)
        listed = write_listed(self._file(piece), safetensors_parts(tensors))
        self._journal.append({"piece": piece, **listed})
        self.pieces[piece] = listed

    def read(self, piece: str) -> dict[str, Tensor]:
        """The tensors of a piece that is in place, by name.

        Raises:
            OutputError: If it cannot be read.
        """
        file = self._file(piece)
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise OutputError(
                f"{file} cannot be read: {first_line(error)}. Run the same command again."
            ) from error

    def writer(self) -> ResultsWriter:
        """A writer of the results themselves into the same directory."""
        return ResultsWriter(self.path, is_begun=True)

    def finish(self) -> None:
        """Removes journal and pieces, once the results are complete."""
        self._may_empty = False
        self._remove_state()
        self.close()

    def close(self) -> None:
        """Releases the lock, after removing everything if no piece was finished."""
        is_worthless = self._may_empty and not self.pieces
        if is_worthless:
            self._remove_state()
            (self.path / results.MANIFEST).unlink(missing_ok=True)
        self._lock.release()
        for directory in self._new_directories if is_worthless else []:
            with suppress(OSError):  # another process uses it by now
                directory.rmdir()

    def _file(self, piece: str) -> Path:
        return self.path / STATE / f"{piece}.safetensors"

    def _remove_state(self) -> None:
        for file in [self.path / JOURNAL, *self.path.glob(".*.tmp")]:
            file.unlink(missing_ok=True)
        shutil.rmtree(self.path / STATE, ignore_errors=True)


def check_results_output(path: str | Path, config: Mapping[str, Any], *, own: bool = False) -> None:
    """Checks that results can be written to a directory, without changing anything there.

    Args:
        path: The directory.
        config: The run's whole configuration.
        own: Whether this process holds the directory's lock.

    Raises:
        OutputError: If the directory cannot be written, is being written by another run, or holds
            anything but unfinished results of the same configuration.
    """
    path = Path(path)
    manifest = _unfinished_manifest(path)
    if manifest is None or not os.access(path, os.W_OK | os.X_OK):
        check_new(path, own=own)
        return
    if not own:
        require_unlocked(path)
    require_same_config(
        path, manifest.get("config"), config, may_change=_MAY_CHANGE, advice=_ADVICE
    )


def _unfinished_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of unfinished results in a directory; None if it holds none."""
    try:
        manifest = json.loads((path / results.MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_of_results = isinstance(manifest, dict) and manifest.get("format") == results.FORMAT
    return manifest if is_of_results and manifest.get("complete") is False else None
