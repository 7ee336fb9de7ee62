"""Whether a store can be written to an output directory; nothing in it is changed."""

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

OVERWRITE_ADVICE = "give another directory, or begin anew with --overwrite"
# Configuration fields that may change when an unfinished run is resumed: no result depends on them.
_MAY_CHANGE = (
    "save_minutes",
    "output",
    "model.device_map",
    "model.gradient_checkpointing",
    "factors.shard",
    "factors.eigen",
)


def _require_nothing_else(path: Path) -> None:
    """Checks that a directory with a store holds nothing beside it, which would be lost."""
    names_of_a_store = {*FOLDERS, STATE, JOURNAL, MANIFEST, LOCK}
    others = [
        entry.name
        for entry in path.iterdir()
        if entry.name not in names_of_a_store
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
    """Checks that a store can be written to a directory.

    Without `replace` the directory may be new, empty, or hold an unfinished store of the same
    configuration. With it, it may hold any store, but nothing else beside the store.

    Args:
        path: The store's directory.
        config: The run's whole configuration.
        own: Whether this process holds the directory's lock.
        replace: Whether a store that is there may be replaced.

    Raises:
        OutputError: If the directory cannot be written, is being written by another run, or holds
            something else.
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
        entries = [entry for entry in path.iterdir() if not _is_left_from_startup(entry)]
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
        _require_nothing_else(path)
    elif entries:
        require_resumable(path, config)


def require_resumable(path: Path, config: Mapping[str, Any]) -> None:
    """Checks that a directory holds an unfinished store of the same configuration.

    Args:
        path: The directory.
        config: The run's whole configuration.

    Raises:
        OutputError: If it holds something else, or a finished store.
    """
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
        raise OutputError(
            f"output {path} holds a finished factor store already; {OVERWRITE_ADVICE}."
        )
    require_same_config(
        path, manifest.get("config"), config, may_change=_MAY_CHANGE, advice=OVERWRITE_ADVICE
    )


def _is_store(path: Path) -> bool:
    """Whether a directory has a store's manifest, of this version's format or another's."""
    with suppress(StoreError):
        return re.fullmatch(r"ekfac_dist/\d+", str(read_manifest(path).get("format"))) is not None
    return False


def _is_left_from_startup(entry: Path) -> bool:
    """Whether a run that was killed before its manifest was in place leaves such an entry."""
    if entry.name in FOLDERS and entry.is_dir():
        return not any(entry.iterdir())
    if entry.name == STATE and entry.is_dir():  # on a host whose workers wrote nothing else
        return all(PASS_FOLDER.fullmatch(inner.name) for inner in entry.iterdir())
    return entry.name == LOCK or entry.match(f".{MANIFEST}.*.tmp")
