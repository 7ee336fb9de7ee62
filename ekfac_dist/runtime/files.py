"""Writes files so that each is complete if it exists, and equal content gives equal bytes."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ekfac_dist.errors import OutputError


def write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Writes a file under a temporary name, flushes it to the disk, and renames it.

    Args:
        path: The file; its directory must exist. An existing file is replaced.
        parts: The content, in consecutive parts.

    Raises:
        OutputError: If it cannot be written. An existing file is then unchanged, and no temporary
            file remains.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        flush_directory(path.parent)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}. Give an output directory that "
            "can be written and has room."
        ) from error
    finally:
        with suppress(OSError):  # it exists only if writing failed
            temporary.unlink()


def flush_directory(path: Path) -> None:
    """Flushes a directory's entries to the disk, so that renamed files keep their names."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_listed(path: Path, parts: list[bytes | memoryview]) -> dict[str, Any]:
    """Writes a file as `write_whole` does.

    Returns:
        The file's entry in a manifest, {"bytes": size, "sha256": hexadecimal digest}.

    Raises:
        OutputError: As for `write_whole`.
    """
    write_whole(path, parts)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return {"bytes": sum(map(len, parts)), "sha256": digest.hexdigest()}


def is_as_listed(path: Path, listed: Mapping[str, Any]) -> bool:
    """Whether a file exists with the size and checksum of its entry, from `write_listed`."""
    return (
        path.is_file()
        and path.stat().st_size == listed["bytes"]
        and file_sha256(path) == listed["sha256"]
    )


def safetensors_parts(
    tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
) -> list[bytes | memoryview]:
    """The content of a safetensors file; equal tensors and strings always give equal bytes.

    Args:
        tensors: The tensors by name, on any device and contiguous or not.
        header: Strings for the header's metadata. They are sorted here, because the order that
            `save` writes them in varies.

    Returns:
        The content in consecutive parts, for `write_whole`.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(on_cpu, metadata=dict(header) if header else None)
    size = int.from_bytes(content[:8], "little")
    fields = json.loads(content[8 : 8 + size])
    if "__metadata__" in fields:
        fields["__metadata__"] = dict(sorted(fields["__metadata__"].items()))
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, memoryview(content)[8 + size :]]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_ahead(path: Path) -> None:
    """Lets the system read a file into memory, while the caller goes on; where it can be asked."""
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    with suppress(OSError), path.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
