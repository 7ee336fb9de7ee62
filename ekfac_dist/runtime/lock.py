"""A lock on a directory, held by a process for as long as it lives: a dead owner holds nothing."""

import fcntl
import json
import os
import socket
from contextlib import suppress
from pathlib import Path

from ekfac_dist.errors import OutputError

LOCK = ".lock"


class DirectoryLock:
    """The lock of a directory that one run writes to.

    Args:
        directory: The directory; it is there.

    Raises:
        OutputError: Another process holds it, and is named; or the file system cannot lock.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK
        while True:
            self._file = _locked(directory, os.O_RDWR | os.O_CREAT)
            with suppress(FileNotFoundError):
                if os.fstat(self._file).st_ino == self._path.stat().st_ino:
                    break
            os.close(self._file)  # it was released, and removed, between the two
        with suppress(OSError):  # on a full disk it is not said who holds it
            os.ftruncate(self._file, 0)
            os.write(self._file, json.dumps([os.getpid(), socket.gethostname()]).encode())

    def release(self) -> None:
        """Gives it up, and leaves nothing behind; once is enough."""
        if self._file < 0:
            return
        with suppress(FileNotFoundError):
            self._path.unlink()
        os.close(self._file)
        self._file = -1


def require_unlocked(directory: Path) -> None:
    """Refuses a directory that another process holds, without touching anything.

    Raises:
        OutputError: As `DirectoryLock` does.
    """
    with suppress(FileNotFoundError):
        os.close(_locked(directory, os.O_RDWR))


def _locked(directory: Path, flags: int) -> int:
    try:
        file = os.open(directory / LOCK, flags, 0o644)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not flags & os.O_CREAT:
            raise  # nobody holds it
        raise OutputError(
            f"output {directory} cannot be written: {error.strerror or error}; give another "
            "directory."
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.read(file, 1000)
        os.close(file)
        raise OutputError(
            f"output {directory} is being written by another run{_in_words(owner)}; wait for its "
            "end, or give another directory."
        ) from error
    except OSError as error:
        os.close(file)
        raise OutputError(
            f"output {directory} cannot be locked: {error.strerror or error}; give a directory on "
            "a file system that has locks."
        ) from error
    return file


def _in_words(owner: bytes) -> str:
    with suppress(ValueError):
        process, host = json.loads(owner)
        return f" (process {process} on {host})"
    return ""
