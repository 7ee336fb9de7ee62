"""Reading a complete factor store: the manifest at once, each file when it is first needed.

Every check of what is on the disk is here, so that a damaged store is an error that names the file.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ekfac_dist.errors import StoreError, first_line
from ekfac_dist.factors.layout import (
    CHECKSUM,
    FOLDERS,
    FORMAT,
    MANIFEST,
    MANIFEST_KEYS,
    REMEDY,
    manifest_checksum,
    read_manifest,
    stored_files,
)
from ekfac_dist.runtime.files import file_sha256


class StoreReader:
    """Reads a complete store.

    Args:
        path: The store's directory.
        verify: Whether to check a file's SHA-256 before it is read for the first time.

    Attributes:
        path: The store's directory.
        manifest: Its manifest.

    Raises:
        StoreError: If the store is missing, of another format or incomplete, or its manifest is
            damaged.
    """

    def __init__(self, path: str | Path, *, verify: bool = False) -> None:
        self.path = Path(path)
        self._verify = verify
        self._verified: set[str] = set()
        if not self.path.is_dir():
            raise StoreError(f"{path} is no directory; give the output of an `estimate` run.")
        if not (self.path / MANIFEST).is_file():
            raise StoreError(
                f"{path} has no {MANIFEST}; give the output directory of an `estimate` run."
            )
        try:
            self.manifest = read_manifest(self.path)
        except StoreError as error:
            raise StoreError(f"{error} {REMEDY}") from error
        stored_format = self.manifest.get("format")
        if stored_format != FORMAT:
            raise StoreError(
                f"{path} has format {stored_format!r}; this version reads {FORMAT!r}, the output "
                "of an `estimate` run."
            )
        if self.manifest.get("complete") is not True:
            raise StoreError(
                f"{path} is incomplete: its run did not finish. Run `estimate` again with the same "
                "configuration."
            )
        missing = [key for key in MANIFEST_KEYS if not isinstance(self.manifest.get(key), dict)]
        if missing:
            raise StoreError(f"{self.path / MANIFEST} lacks {', '.join(missing)}. {REMEDY}")
        for file, listed in self.manifest["files"].items():
            if not _is_listing(file, listed):
                raise StoreError(
                    f"{self.path / MANIFEST} lists {file!r} as {listed!r}; it must list files in "
                    f"{', '.join(FOLDERS)}, each with its bytes and sha256. {REMEDY}"
                )
        if CHECKSUM not in self.manifest:
            raise StoreError(
                f"{self.path / MANIFEST} is damaged or was edited: it has no {CHECKSUM} of what it "
                f"says. {REMEDY}"
            )
        if self.manifest[CHECKSUM] != manifest_checksum(self.manifest):
            raise StoreError(
                f"{self.path / MANIFEST} is damaged: what it says has changed since it was "
                f"written. {REMEDY}"
            )

    @contextmanager
    def open(self, file: str) -> Iterator[Any]:
        """Opens one file, memory-mapped, after comparing it with what the manifest lists.

        Args:
            file: Its path inside the store.

        Raises:
            StoreError: If the file is not listed, missing, damaged, or no safetensors file.
        """
        path = self.check(file)
        if self._verify and file not in self._verified:
            if file_sha256(path) != self.manifest["files"][file]["sha256"]:
                raise StoreError(
                    f"{path} is damaged: its SHA-256 is not the one in the manifest. {REMEDY}"
                )
            self._verified.add(file)
        try:
            with safe_open(path, framework="pt") as opened:
                yield opened
        except (SafetensorError, OSError) as error:
            raise StoreError(
                f"{path} is no whole safetensors file: {first_line(error)}. {REMEDY}"
            ) from error

    def check(self, file: str) -> Path:
        """The path of a listed file, after checking that it is there and of the listed size.

        Args:
            file: Its path inside the store.

        Raises:
            StoreError: If it is not listed, missing, or of another size.
        """
        listed = self.manifest["files"].get(file)
        if listed is None:
            raise StoreError(f"{self.path} does not list {file} in its manifest. {REMEDY}")
        path = self.path / file
        try:
            num_bytes = path.stat().st_size
        except OSError as error:
            raise StoreError(
                f"{path} is missing, though the manifest lists it. {REMEDY}"
            ) from error
        if num_bytes != listed["bytes"]:
            raise StoreError(
                f"{path} has {num_bytes} bytes; the manifest says {listed['bytes']}: it is "
                f"damaged. {REMEDY}"
            )
        return path

    def tensor(self, file: str, key: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor of one file.

        Args:
            file: The file's path inside the store.
            key: The tensor's name.
            shape: The shape that it must have.

        Raises:
            StoreError: If the file is missing or damaged, or the tensor is missing, of another
                shape, or neither float32 nor float64.
        """
        with self.open(file) as opened:
            if key not in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                raise StoreError(f"{self.path / file} holds no tensor {key!r}. {REMEDY}")
            tensor = opened.get_tensor(key)
        if tuple(tensor.shape) != shape:
            raise StoreError(
                f"{self.path / file}: {key} has shape {list(tensor.shape)}; the manifest's modules "
                f"say {list(shape)}. {REMEDY}"
            )
        if tensor.dtype not in (torch.float32, torch.float64):
            raise StoreError(
                f"{self.path / file}: {key} is {tensor.dtype}; float32 or float64 only. {REMEDY}"
            )
        return tensor

    def header(self, file: str) -> dict[str, str]:
        """The strings in the header of one file."""
        with self.open(file) as opened:
            return dict(opened.metadata() or {})

    def verify(self) -> Iterator[tuple[str, str | None]]:
        """Checks size and SHA-256 of every listed file, and that the store has no other files.

        Yields:
            (file, None) for an undamaged file; (file, what is wrong with it) for any other.
        """
        for file, listed in self.manifest["files"].items():
            path = self.path / file
            if not path.is_file():
                yield file, "is missing"
            elif path.stat().st_size != listed["bytes"]:
                yield file, f"has {path.stat().st_size} bytes, not {listed['bytes']}"
            elif file_sha256(path) != listed["sha256"]:
                yield file, "has another SHA-256: its content has changed"
            else:
                yield file, None
        for file in stored_files(self.path):
            if file not in self.manifest["files"]:
                yield file, "is not listed in the manifest"

    def total_bytes(self) -> int:
        """Size of all listed files and the manifest, in bytes."""
        listed = sum(entry["bytes"] for entry in self.manifest["files"].values())
        return listed + (self.path / MANIFEST).stat().st_size


def _is_listing(file: str, listed: object) -> bool:
    """Whether an entry of the manifest's `files` names a file in the store's folders completely."""
    parts = PurePosixPath(file).parts
    return (
        len(parts) > 1
        and parts[0] in FOLDERS
        and ".." not in parts
        and isinstance(listed, dict)
        and isinstance(listed.get("bytes"), int)
        and isinstance(listed.get("sha256"), str)
    )
