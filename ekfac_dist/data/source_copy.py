"""The copy of a local source in the cache.

`datasets` recognises a local file by its path and modification time, so it would return the old
examples of a file that was rewritten with its time restored. Here the content decides: the examples
are copied, once, into a folder of the cache that is named by the SHA-256 of the source's bytes,

    sources/<hash of the path>/<hash of the content and of how it is read>/

A folder gets its name only when it is complete and the source did not change meanwhile; nothing
writes to it afterwards.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets import Dataset
from filelock import FileLock

from ekfac_dist.data.tokenizing import cache_directory
from ekfac_dist.errors import DataError

# A copy of a source's former content is deleted when a new copy is made and the old one was not
# opened for this long; until then another run may be reading from it.
_KEEP_SECONDS = 7 * 24 * 3600


@dataclass(frozen=True)
class Content:
    """A local source's content.

    Attributes:
        sha256: SHA-256 of a file's bytes; of a saved data set, over its split's file names and
            their SHA-256s.
        stats: Of each file the size in bytes, and the times of its last change of content and of
            status, in ns; taken before the bytes were read.
    """

    sha256: str
    stats: tuple[tuple[int, int, int], ...]


def file_stats(files: list[Path]) -> tuple[tuple[int, int, int], ...]:
    """Of each file its size in bytes, and when its content and its status last changed, in ns."""
    stats = [file.stat() for file in files]
    return tuple((stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats)


def read_copied(
    files: list[Path],
    path: Path,
    content: Content | None,
    reading_options: str,
    split: str,
    write: Callable[[Path], object],
    read: Callable[[Path], Dataset],
) -> Dataset:
    """The examples of a local source, read from its copy in the cache; the copy is made if missing.

    Args:
        files: The source's files.
        path: The source.
        content: The source's content; None if its files are gone.
        reading_options: How the source is read, as text; the copy depends on it, too.
        split: The split, or part of one, that is read from the copy.
        write: Copies the examples into an existing folder.
        read: Opens such a folder.

    Raises:
        DataError: If the source is gone or changes while it is copied, or the cache cannot be
            written.
    """
    if content is None:
        raise DataError(f"{path} was not there a moment ago; run it again.")
    key = hashlib.sha256(
        f"{content.sha256}|{reading_options}|{datasets.__version__}".encode()
    ).hexdigest()[:32]
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]
    home = cache_directory() / "sources" / name
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{path} cannot be cached under {home}: {error.strerror or error}; set HF_HOME to a "
            "directory that can be written."
        ) from error
    folder, unfinished = home / key, home / f"{key}.part"
    with FileLock(home / "lock"):
        if not folder.exists():
            _remove_old_copies(home)
            unfinished.mkdir()
            try:
                write(unfinished)
                if file_stats(files) != content.stats:
                    raise DataError(
                        f"{path} changed while it was read; run it again when it is written whole."
                    )
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        os.utime(folder)
        examples = read(folder)
    examples._fingerprint = hashlib.sha256(f"{key}|{split}".encode()).hexdigest()[:32]
    return examples


def _remove_old_copies(home: Path) -> None:
    """Removes unfinished copies, and copies that were not opened lately."""
    for folder in home.iterdir():
        is_old = time.time() - folder.stat().st_mtime > _KEEP_SECONDS
        if folder.is_dir() and (is_old or folder.suffix == ".part"):
            shutil.rmtree(folder, ignore_errors=True)
