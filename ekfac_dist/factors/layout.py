"""The factor store: safetensors files and one JSON manifest in a directory.

    manifest.json
    covariance/<factor>.safetensors    sum          [n, n]  raw sum; header: count
    eigenbasis/<factor>.safetensors    eigenvectors [n, n]  in columns; eigenvalues [n] ascending
    spectrum/<module>.safetensors      lambda       [O, I]  Λ

Of a factor of several blocks on its diagonal the keys end in .0, .1, …, a block each. The manifest
lists each file with its size and SHA-256, and says `complete: true` only once all of
them are in place. This module has the names and the reading, `store_writer` the writing. They know
names, bytes and tensors; they know no mathematics.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ekfac_dist.errors import StoreError, first_line

FORMAT = "ekfac_dist/1"
MANIFEST = "manifest.json"
FOLDERS = ("covariance", "eigenbasis", "spectrum")
STATE = "state"
MANIFEST_KEYS = (
    "model",
    "data",
    "fisher",
    "modules",
    "coverage",
    "passes",
    "files",
    "software",
    "config",
)
CHECKSUM = "checksum"
# Files that are being written; the folder of a pass's saved states; a store that replaces another.
TEMPORARY_FILES = ".*.tmp"
PASS_FOLDER = re.compile(r"(covariance|refit)-\d+(-of-\d+)?")
NEXT_PREFIX = ".next-"
REMEDY = "Copy the store again, or fit the factors again."


def covariance_file(factor: str) -> str:
    """Path, inside a store, of a factor's raw sum."""
    return f"covariance/{factor}.safetensors"


def eigenbasis_file(factor: str) -> str:
    """Path, inside a store, of a factor's eigenvectors and eigenvalues."""
    return f"eigenbasis/{factor}.safetensors"


def spectrum_file(module: str) -> str:
    """Path, inside a store, of a module's Λ."""
    return f"spectrum/{module}.safetensors"


def block_keys(key: str, number: int) -> list[str]:
    """Names, in a file, of a factor's blocks on its diagonal; of one that is whole, the key."""
    return [key] if number == 1 else [f"{key}.{k}" for k in range(number)]


def stored_files(store: Path) -> list[str]:
    """Every file in a store's folders, as a path inside the store."""
    found = [p for folder in FOLDERS for p in (store / folder).rglob("*") if p.is_file()]
    return sorted(str(path.relative_to(store)) for path in found)


def read_manifest(path: Path) -> dict[str, Any]:
    """A store's manifest, as it is.

    Args:
        path: The store's directory.

    Raises:
        StoreError: It cannot be read, or is no JSON object.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"{path / MANIFEST} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path / MANIFEST} is not JSON: {first_line(error)}.") from error
    if not isinstance(manifest, dict):
        raise StoreError(f"{path / MANIFEST} is no JSON object.")
    return manifest


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what a manifest says, but for its own checksum, however it is laid out."""
    said = {key: value for key, value in manifest.items() if key != CHECKSUM}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# What each kind of labels makes of the Fisher.
FISHER_NAMES = {"sampled": "true Fisher", "data": "empirical Fisher"}
