"""The format of the factor store: a directory of safetensors files and one JSON manifest.

    manifest.json
    covariance/<factor>.safetensors    sum          [n, n]  raw sum; header: count
    eigenbasis/<factor>.safetensors    eigenvectors [n, n]  in columns
                                       eigenvalues  [n]     ascending, of sum / count
    spectrum/<module>.safetensors      lambda       [O, I]  Λ, the corrected eigenvalues

A factor of several diagonal blocks has one tensor per block, named with the suffixes .0, .1, ….
The manifest lists each file with its size and SHA-256; `complete` is true only once all of them are
in place.

This module has the names and reads the manifest; `writer` and `reader` handle the files. None of
the three computes anything but checksums.
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
# What the Fisher is called, by where its labels come from.
FISHER_NAMES = {"sampled": "true Fisher", "data": "empirical Fisher"}
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
TEMPORARY_FILES = ".*.tmp"  # files that are still being written
# Folders in `STATE`: one per pass over a group of modules, with the workers' saved running sums.
PASS_FOLDER = re.compile(r"(covariance|refit)-\d+(-of-\d+)?")
NEXT_PREFIX = ".next-"  # followed by the id of a run whose store is about to replace another
REMEDY = "Copy the store again, or fit the factors again."


def covariance_file(factor: str) -> str:
    """Path of a factor's raw sum inside a store."""
    return f"covariance/{factor}.safetensors"


def eigenbasis_file(factor: str) -> str:
    """Path of a factor's eigenvectors and eigenvalues inside a store."""
    return f"eigenbasis/{factor}.safetensors"


def spectrum_file(module: str) -> str:
    """Path of a module's Λ inside a store."""
    return f"spectrum/{module}.safetensors"


def block_keys(key: str, num_blocks: int) -> list[str]:
    """Names of the tensors of a factor's diagonal blocks in its file; just `key` for one block."""
    return [key] if num_blocks == 1 else [f"{key}.{k}" for k in range(num_blocks)]


def stored_files(store: Path) -> list[str]:
    """Every file in the folders of a store, as a sorted list of paths inside the store."""
    files = [p for folder in FOLDERS for p in (store / folder).rglob("*") if p.is_file()]
    return sorted(str(path.relative_to(store)) for path in files)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a store; its entries are not checked.

    Args:
        path: The store's directory.

    Raises:
        StoreError: If the manifest cannot be read, or is no JSON object.
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
    """SHA-256 of all entries of a manifest but its own checksum, whatever its order and layout."""
    entries = {key: value for key, value in manifest.items() if key != CHECKSUM}
    text = json.dumps(entries, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
