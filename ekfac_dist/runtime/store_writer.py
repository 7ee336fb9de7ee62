"""Writing a factor store: each file whole or not at all, the manifest last.

Worker 0 writes; see `store` for the format and for reading.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ekfac_dist.errors import OutputError, StoreError
from ekfac_dist.runtime.files import safetensors_parts, write_listed, write_whole
from ekfac_dist.runtime.store import FOLDERS, FORMAT, MANIFEST, read_manifest, stored_files

_TEMPORARY_MANIFEST = f".{MANIFEST}.*.tmp"


class StoreWriter:
    """Writes one store. Worker 0 owns it.

    Args:
        path: The store's directory.
        config: The run's whole configuration; an unfinished store of the same one is begun anew.

    Raises:
        OutputError: The directory cannot be written, or holds a finished store, another run, or
            files that are no store.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.files: dict[str, dict[str, Any]] = {}
        check_output(self.path, config)
        try:
            for folder in FOLDERS:
                (self.path / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"output {self.path} cannot be made: {error.strerror or error}. Give a directory "
                "that can be written."
            ) from error
        self._write_manifest({"format": FORMAT, "complete": False, "config": dict(config)})

    def write(
        self, file: str, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
    ) -> None:
        """Writes one safetensors file.

        Args:
            file: Its path inside the store.
            tensors: What it holds; moved to the CPU and made contiguous.
            header: Strings for the file's own header.
        """
        self.files[file] = write_listed(self.path / file, safetensors_parts(tensors, header))

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Writes the manifest that makes the store complete.

        Args:
            manifest: Every entry but format, complete and files.
        """
        # What an unfinished run of the same configuration has left.
        for file in stored_files(self.path):
            if file not in self.files:
                (self.path / file).unlink()
        for temporary in self.path.glob(_TEMPORARY_MANIFEST):
            temporary.unlink()
        self._write_manifest(
            {
                "format": FORMAT,
                "complete": True,
                **manifest,
                "files": dict(sorted(self.files.items())),
            }
        )

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(self.path / MANIFEST, [text.encode(), b"\n"])


def check_output(path: str | Path, config: Mapping[str, Any]) -> None:
    """Refuses an output that a store could not be written to, without touching anything.

    Args:
        path: The store's directory.
        config: The run's whole configuration.

    Raises:
        OutputError: It cannot be written, or holds anything but an unfinished store of this run.
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
    if not entries:
        return
    if not (path / MANIFEST).is_file():
        raise OutputError(
            f"output {path} exists and is no factor store (it holds {entries[0].name}); give a "
            "directory that is new or empty."
        )
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
            f"output {path} holds a finished factor store already; give another directory, or "
            "remove this one."
        )
    if manifest.get("config") != json.loads(json.dumps(config)):
        raise OutputError(
            f"output {path} holds another run, unfinished and of another configuration; give "
            "another directory, or remove this one."
        )


def _is_from_a_false_start(entry: Path) -> bool:
    """Whether it is all that a run leaves which is killed before its manifest is in place."""
    if entry.name in FOLDERS and entry.is_dir():
        return not any(entry.iterdir())
    return entry.match(_TEMPORARY_MANIFEST)
