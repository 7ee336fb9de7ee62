"""A run's journal: a line for everything that is done, appended and flushed to the disk.

    0f3a… {"file": "covariance/a.safetensors", "bytes": 4194424, "sha256": "…"}

A line begins with the start of its own SHA-256. What a killed run leaves is a whole number of lines
and perhaps the beginning of one more, which is cut off when the journal is opened again.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ekfac_dist.errors import OutputError, StoreError

JOURNAL = "journal.jsonl"
_DIGITS = 16


class Journal:
    """The journal of the run in a directory; made with its first record.

    Args:
        directory: Where it lies.
        advice: What an error advises against a damaged one.

    Attributes:
        records: What it holds, in order.

    Raises:
        StoreError: A line that is not the last is damaged.
        OutputError: It cannot be read or written.
    """

    def __init__(self, directory: Path, advice: str = "Begin the run anew: --overwrite.") -> None:
        self.path = directory / JOURNAL
        self._advice = advice
        self.records: list[dict[str, Any]] = []
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
            self._size = self._read(content)
            if self._size < len(content):
                os.truncate(self.path, self._size)
        except OSError as error:
            raise self._cannot(error) from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a record; it is on the disk when this returns.

        Raises:
            OutputError: It cannot be written; the journal is as it was.
        """
        text = json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
        line = _digest(text) + b" " + text + b"\n"
        try:
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, self._size)  # needs no room
            raise self._cannot(error) from error
        self._size += len(line)
        self.records.append(dict(record))

    def _read(self, content: bytes) -> int:
        """Takes every whole line; gives the size of what is whole."""
        lines = content.split(b"\n")
        size = 0
        for number, line in enumerate(lines[:-1], start=1):
            digest, _, text = line.partition(b" ")
            if digest != _digest(text):
                if number < len(lines) - 1 or lines[-1]:
                    raise StoreError(
                        f"{self.path} is damaged in line {number}; what its run has done cannot be "
                        f"told. {self._advice}"
                    )
                break  # the last line: it was being written
            self.records.append(json.loads(text))
            size += len(line) + 1
        return size

    def _cannot(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path} cannot be written: {error.strerror or error}. Give an output directory "
            "that can be written and has room."
        )


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:_DIGITS].encode()
