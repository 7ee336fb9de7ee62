"""Files that are whole if they exist."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

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
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}. Give an output directory that "
            "can be written and has room."
        ) from error
    finally:
        with suppress(OSError):  # it is there only if the writing failed
            temporary.unlink()
