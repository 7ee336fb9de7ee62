"""Whether a store can be written to a directory, looked at without touching anything."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ekfac_dist.errors import OutputError, StoreError
from ekfac_dist.factors.layout import (
    FOLDERS,
    FORMAT,
    MANIFEST,
    NEXT_PREFIX,
    PASS_FOLDER,
    STATE,
    TEMPORARY_FILES,
    read_manifest,
)
from ekfac_dist.runtime.journal import JOURNAL
from ekfac_dist.runtime.lock import LOCK, require_unlocked
from ekfac_dist.runtime.resuming import require_same_config

ADVICE = "give another directory, or begin anew with --overwrite"


def _require_replaceable(path: Path) -> None:
    own = {*FOLDERS, STATE, JOURNAL, MANIFEST, LOCK}
    others = [
        entry.name
        for entry in path.iterdir()
        if entry.name not in own
        and not entry.match(TEMPORARY_FILES)
        and not entry.name.startswith(NEXT_PREFIX)
    ]
    if others:
        raise OutputError(
            f"output {path} cannot be overwritten, for it holds {others[0]} beside the store; move "
            "that away, or give another directory."
        )


def check_output(
    path: str | Path, config: Mapping[str, Any], *, own: bool = False, replace: bool = False
) -> None:
    """Refuses an output that a store could not be written to, without touching anything.

    Args:
        path: The store's directory.
        config: The run's whole configuration.
        own: Whether this process holds the directory's lock.
        replace: Whether any store that is there may be replaced.

    Raises:
        OutputError: It cannot be written, is being written by another run, or holds anything but an
            unfinished store of this run; or, if it may be replaced, but a store alone.
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
    if entries and replace and _is_store(path):
        _require_replaceable(path)
    elif entries:
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
        raise OutputError(f"output {path} holds a finished factor store already; {ADVICE}.")
    require_same_config(path, manifest.get("config"), config, may_change=_MAY_CHANGE, advice=ADVICE)


# Fields that a run may have another value of when it goes on: no number depends on them.
_MAY_CHANGE = ("save_minutes", "output", "model.device_map")


def _is_store(path: Path) -> bool:
    with suppress(StoreError):
        return re.fullmatch(r"ekfac_dist/\d+", str(read_manifest(path).get("format"))) is not None
    return False


def _is_from_a_false_start(entry: Path) -> bool:
    """Whether it is all that a run leaves which is killed before its manifest is in place."""
    if entry.name in FOLDERS and entry.is_dir():
        return not any(entry.iterdir())
    if entry.name == STATE and entry.is_dir():  # of a host whose workers wrote nothing else
        return all(PASS_FOLDER.fullmatch(inner.name) for inner in entry.iterdir())
    return entry.name == LOCK or entry.match(f".{MANIFEST}.*.tmp")
