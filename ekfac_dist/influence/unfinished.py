"""Results that are under way: what finished pieces of the work came to, for the same run to go on.

Until the results are whole, their directory holds

    manifest.json     complete: false, config, and what the run began with
    journal.jsonl     the pieces that are in place, with their checksums
    state/            a safetensors file for each piece

A run that ends before it has finished a piece leaves nothing. Worker 0 writes and reads, and holds
the directory's lock. Knows files; what the pieces are, `saved_blocks` says.
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
from ekfac_dist.influence.results import ResultsWriter, check_new, make_directory, write_manifest
from ekfac_dist.runtime.files import is_as_listed, safetensors_parts, write_listed
from ekfac_dist.runtime.journal import JOURNAL, Journal
from ekfac_dist.runtime.lock import DirectoryLock, require_unlocked
from ekfac_dist.runtime.memory import as_text, free_disk_bytes
from ekfac_dist.runtime.resuming import require_same_beginning, require_same_config

# What pieces look like; those of another look cannot be gone on with.
UNFINISHED_FORMAT = 1

_ADVICE = "give another directory, or remove this one"
# Fields that a run may have another value of when it goes on: no score depends on them.
_MAY_CHANGE = ("output", "model.device_map")
_RESULTS = (
    results.QUERIES,
    results.SCORES,
    results.TOP,
    results.BOTTOM,
    results.DETAILS,
    results.SEQUENCES,
)


class UnfinishedResults:
    """The directory of one run of `query`, from its beginning to its end. Worker 0 owns it.

    Args:
        path: The directory: new, empty, or of an unfinished run of the same.
        config: The run's whole configuration.
        begins: What else must be the same for an unfinished run to be gone on with, such as
            fingerprints, by name.

    Attributes:
        pieces: What is listed of each piece that is in place, by its name.

    Raises:
        OutputError: The directory cannot be written, is being written by another run, or holds
            another run, finished results, or anything else.
        StoreError: Its journal is damaged.
    """

    def __init__(
        self, path: str | Path, config: Mapping[str, Any], begins: Mapping[str, Any]
    ) -> None:
        self.path = Path(path)
        self.pieces: dict[str, dict[str, Any]] = {}
        self._is_own = False  # whether it may be emptied
        self._made = [one for one in (self.path, *self.path.parents) if not one.exists()]
        check_results_output(self.path, config)
        make_directory(self.path)
        self._lock = DirectoryLock(self.path)
        try:
            self._begin(config, {"format": UNFINISHED_FORMAT, **begins})
        except BaseException:
            self.close()
            raise

    def _begin(self, config: Mapping[str, Any], begins: Mapping[str, Any]) -> None:
        check_results_output(
            self.path, config, own=True
        )  # again: another run may have been quicker
        manifest = _unfinished_manifest(self.path)
        if manifest is not None:
            require_same_beginning(self.path, manifest.get("begins"), begins, advice=_ADVICE)
        self._is_own = manifest is None
        if manifest is None:
            write_manifest(self.path, {"complete": False, "config": config, "begins": begins})
        for file in _RESULTS:  # of a run that failed while it wrote them
            (self.path / file).unlink(missing_ok=True)
        self._journal = Journal(self.path, "Remove the directory, or give another output.")
        for record in self._journal.records:
            listed = {key: record[key] for key in ("bytes", "sha256")}
            self.pieces[record["piece"]] = listed
        self._is_own = True

    def drop_damaged(self, on_bytes: Callable[[int], None]) -> list[str]:
        """Compares every piece with its checksum, and gives up those that have changed.

        Args:
            on_bytes: Told the size of each when it has been compared.

        Returns:
            The files that were given up.
        """
        lost = []
        for piece, listed in list(self.pieces.items()):
            if not is_as_listed(self._file(piece), listed):
                del self.pieces[piece]
                lost.append(str(self._file(piece).relative_to(self.path)))
            on_bytes(listed["bytes"])
        return lost

    def require_disk_space(self, result_bytes: int, state_bytes: int) -> None:
        """Refuses a run that the disk has no room for.

        Args:
            result_bytes: Of the results.
            state_bytes: Of all pieces, those that are in place too.

        Raises:
            OutputError: There is less.
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
        """Keeps what a piece of the work came to.

        Raises:
            OutputError: It cannot be written; what was kept before is still there.
        """
        make_directory(self.path / STATE)
        listed = write_listed(self._file(piece), safetensors_parts(tensors))
        self._journal.append({"piece": piece, **listed})
        self.pieces[piece] = listed

    def read(self, piece: str) -> dict[str, Tensor]:
        """The same again.

        Raises:
            OutputError: It cannot be read.
        """
        file = self._file(piece)
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise OutputError(
                f"{file} cannot be read: {first_line(error)}. Run the same command again."
            ) from error

    def writer(self) -> ResultsWriter:
        """Takes the results themselves."""
        return ResultsWriter(self.path, is_begun=True)

    def finish(self) -> None:
        """Removes all but the results, which are whole."""
        self._is_own = False
        self._remove_state()
        self.close()

    def close(self) -> None:
        """Lets others write to the directory; leaves nothing if no piece was finished."""
        is_empty = self._is_own and not self.pieces
        if is_empty:
            self._remove_state()
            (self.path / results.MANIFEST).unlink(missing_ok=True)
        self._lock.release()
        for directory in self._made if is_empty else []:
            with suppress(OSError):  # in use by now
                directory.rmdir()

    def _file(self, piece: str) -> Path:
        return self.path / STATE / f"{piece}.safetensors"

    def _remove_state(self) -> None:
        for left in [self.path / JOURNAL, *self.path.glob(".*.tmp")]:
            left.unlink(missing_ok=True)
        shutil.rmtree(self.path / STATE, ignore_errors=True)


def check_results_output(path: str | Path, config: Mapping[str, Any], *, own: bool = False) -> None:
    """Refuses an output that results could not be written to, without touching anything.

    Args:
        path: The directory.
        config: The run's whole configuration.
        own: Whether this process holds the directory's lock.

    Raises:
        OutputError: It cannot be written, is being written by another run, or holds anything but an
            unfinished run of this configuration.
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
    """The manifest of a run of `query` that has not finished; None if there is none there."""
    try:
        manifest = json.loads((path / results.MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_ours = isinstance(manifest, dict) and manifest.get("format") == results.FORMAT
    return manifest if is_ours and manifest.get("complete") is False else None
