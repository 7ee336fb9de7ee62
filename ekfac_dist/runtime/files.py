"""Files that are whole if they exist, and the same bytes for the same content."""

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
        path: The file; its folder is there.
        parts: Its content, piece after piece.

    Raises:
        OutputError: It cannot be written; nothing is left of it, and what was there stays.
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
        with suppress(OSError):  # it is there only if the writing failed
            temporary.unlink()


def flush_directory(path: Path) -> None:
    """Flushes to the disk what a directory's files are called."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_listed(path: Path, parts: list[bytes | memoryview]) -> dict[str, Any]:
    """Writes a file as `write_whole` does.

    Returns:
        What a manifest lists of it: its bytes and sha256.
    """
    write_whole(path, parts)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return {"bytes": sum(map(len, parts)), "sha256": digest.hexdigest()}


def is_as_listed(path: Path, listed: Mapping[str, Any]) -> bool:
    """Whether a file is there with the size and the checksum that `write_listed` gave."""
    return (
        path.is_file()
        and path.stat().st_size == listed["bytes"]
        and file_sha256(path) == listed["sha256"]
    )


def safetensors_parts(
    tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
) -> list[bytes | memoryview]:
    """A safetensors file's content: the same tensors and strings are the same bytes, always.

    Args:
        tensors: What it holds; moved to the CPU and made contiguous.
        header: Strings for its header, which are put in order; `save` leaves theirs to chance.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(on_cpu, metadata=dict(header) if header else None)
    size = int.from_bytes(content[:8], "little")
    written = json.loads(content[8 : 8 + size])
    if "__metadata__" in written:
        written["__metadata__"] = dict(sorted(written["__metadata__"].items()))
    text = json.dumps(written, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, memoryview(content)[8 + size :]]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
