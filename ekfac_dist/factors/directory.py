"""Changes to a store's directory: making folders, removing files, writing the manifest.

Knows the names in a store; `writer` and `replacement` decide when a run writes or replaces one.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ekfac_dist.errors import OutputError
from ekfac_dist.factors.layout import MANIFEST, STATE
from ekfac_dist.runtime.files import write_whole


def make_folders(path: Path, *folders: str) -> None:
    """Makes a directory, and folders in it.

    Raises:
        OutputError: If one cannot be made.
    """
    try:
        for folder in (".", *folders):
            (path / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"output {path} cannot be made: {error.strerror or error}. Give a directory that can "
            "be written."
        ) from error


def remove(path: Path) -> None:
    """Removes a file, or a folder with its content; a path that does not exist is ignored."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_store_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes a manifest into a folder, whole or not at all."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(folder / MANIFEST, [text.encode(), b"\n"])


def saved_states(path: Path) -> set[Path]:
    """The folders of all workers' saved states, of all passes, in a store's directory."""
    return set(path.glob(f"{STATE}/*/*"))


def total_bytes(folder: Path) -> int:
    """Size of all files in a folder, from which another process may be removing some."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size
    return total
