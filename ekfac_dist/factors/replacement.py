"""How the unfinished store of a new run takes the place of another run's store.

Until something of the new run is on the disk, the old store stays as it is. The first thing may be
a factor file, the record of a finished pass, or a worker's saved state. Then, in this order,

    .next-RUN/        is made, with the new run's folders, journal and manifest
    manifest.json     is replaced by that manifest: from here on the directory is RUN's, unfinished
    .next-RUN/…       takes the place of the old folders and journal, one after the other

If that is interrupted, the next start of the same run does the remaining steps, and a start of any
other run removes `.next-RUN`.
"""

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ekfac_dist.errors import OutputError
from ekfac_dist.factors.directory import (
    make_folders,
    remove,
    saved_states,
    total_bytes,
    write_store_manifest,
)
from ekfac_dist.factors.layout import FOLDERS, MANIFEST, NEXT_PREFIX, STATE
from ekfac_dist.runtime.files import flush_directory, write_listed
from ekfac_dist.runtime.journal import JOURNAL, Journal


class Replacement:
    """The replacement of another run's store by this run's, from its announcement to its end.

    Args:
        path: The store's directory.
        run_id: This run's id.

    Attributes:
        num_bytes: Size of the old store, in bytes.
        is_pending: Whether the old store is still in place: true until this run's manifest has
            replaced its manifest.
    """

    def __init__(self, path: Path, run_id: str) -> None:
        self._path, self._next = path, path / f"{NEXT_PREFIX}{run_id}"
        self._old_states = saved_states(path)
        self.num_bytes = total_bytes(path)
        self.is_pending = True

    def carry_out(
        self,
        manifest: Mapping[str, Any],
        records: Mapping[str, Mapping[str, Any]],
        file: str | None,
        parts: list[bytes | memoryview] | None,
    ) -> dict[str, dict[str, Any]]:
        """Replaces the old store by this run's unfinished one.

        Args:
            manifest: This run's manifest.
            records: Results of this run's finished stages, by the stage's name.
            file: The first file of the new store, as a path inside it; None: it has none yet.
            parts: That file's content.

        Returns:
            What the manifest will list of the new store's files, by their paths.

        Raises:
            OutputError: If something cannot be written. The old store is unchanged if the
                replacement is still pending; else this run can be resumed.
        """
        files = {}
        try:
            make_folders(self._next, *FOLDERS)
            (self._next / JOURNAL).touch()  # the old journal is replaced even by an empty one
            journal = Journal(self._next)
            for stage, content in records.items():
                journal.append({"stage": stage, **content})
            if file is not None and parts is not None:
                files[file] = write_listed(self._next / file, parts)
                journal.append({"file": file, **files[file]})
            write_store_manifest(self._next, manifest)
            (self._next / MANIFEST).replace(self._path / MANIFEST)
            flush_directory(self._path)
            self.is_pending = False
            for state in self._old_states:
                remove(state)
            _move_in(self._next, self._path)
            for other in self._path.glob(f"{NEXT_PREFIX}*"):
                remove(other)
        except OSError as error:
            raise OutputError(
                f"output {self._path} cannot be overwritten: {error.strerror or error}; give "
                "another directory."
            ) from error
        return files

    def give_up(self) -> None:
        """Removes what this run has put beside the old store, which stays."""
        for state in saved_states(self._path) - self._old_states:
            shutil.rmtree(state, ignore_errors=True)
        for folder in [*self._path.glob(f"{STATE}/*"), self._path / STATE]:
            with suppress(OSError):  # it does not exist, or is not empty
                folder.rmdir()
        shutil.rmtree(self._next, ignore_errors=True)


def finish_or_remove(path: Path, run_id: str) -> None:
    """Finishes this run's interrupted replacement of a store; removes those of other runs."""
    for folder in path.glob(f"{NEXT_PREFIX}*"):
        if folder.name == NEXT_PREFIX + run_id:
            _move_in(folder, path)
        else:
            remove(folder)


def _move_in(source: Path, path: Path) -> None:
    """Moves the folders and the journal of a store from `source` over those in `path`.

    It can be repeated after an interruption: what has been moved is no longer in `source`.
    """
    for name in (*FOLDERS, JOURNAL):
        if (source / name).exists():
            remove(path / name)
            (source / name).rename(path / name)
    shutil.rmtree(source)
