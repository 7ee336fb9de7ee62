"""A lock on a directory that one run writes to; it ends with the process that holds it.

The lock is the file `.lock` in the directory, locked by `filelock`; its content names the holder.
"""

import errno
import json
import os
import socket
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ekfac_dist.errors import OutputError

LOCK = ".lock"

# Long enough for a second attempt if the file is removed between its opening and its locking.
_PATIENCE_SECONDS = 0.2
_POLL_SECONDS = 0.05
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class DirectoryLock:
    """The lock of a directory, held until `release`, or the end of this object or its process.

    Args:
        directory: An existing directory.

    Raises:
        OutputError: If another process holds the lock, which is named, or if the directory cannot
            be written to or its file system has no locks.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / LOCK
        self._lock: FileLock | None = _locked(directory)
        with suppress(OSError):  # on a full disk the holder stays unnamed
            self._file.write_text(json.dumps([os.getpid(), socket.gethostname()]))

    def release(self) -> None:
        """Releases the lock and removes its file; does nothing the second time."""
        if self._lock is None:
            return
        self._file.unlink(missing_ok=True)
        self._lock.release()
        self._lock = None


def require_unlocked(directory: Path) -> None:
    """Refuses a directory that another process has locked; leaves it as it is.

    Raises:
        OutputError: As of `DirectoryLock`.
    """
    if (directory / LOCK).exists():
        _locked(directory).release()


def _locked(directory: Path) -> FileLock:
    lock = FileLock(directory / LOCK, fallback_to_soft=False)
    try:
        lock.acquire(timeout=_PATIENCE_SECONDS, poll_interval=_POLL_SECONDS)
    except Timeout as error:
        raise OutputError(
            f"output {directory} is being written by another run{_holder(directory / LOCK)}; wait "
            "for its end, or give another directory."
        ) from error
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise OutputError(
                f"output {directory} cannot be locked: {error.strerror or error}; give a directory "
                "on a file system that has locks."
            ) from error
        raise OutputError(
            f"output {directory} cannot be written: {error.strerror or error}; give another "
            "directory."
        ) from error
    return lock


def _holder(file: Path) -> str:
    """Process and host that a lock's file names, for a sentence; "" where it names none."""
    with suppress(OSError, ValueError):
        process, host = json.loads(file.read_text())
        return f" (process {process} on {host})"
    return ""
