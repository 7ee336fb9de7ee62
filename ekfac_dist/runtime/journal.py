"""A run's journal: a file with a line for each finished step, appended and flushed to the disk.

    0f3a… {"file": "covariance/a.safetensors", "bytes": 4194424, "sha256": "…"}

A line begins with the first digits of its record's SHA-256. A killed run leaves complete lines and
possibly the beginning of one more, which is cut off when the journal is opened again.
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
    """The journal of the run in a directory. Its file is created with the first record.

    Args:
        directory: The run's output directory.
        advice: Sentence for the error about a damaged journal.

    Attributes:
        path: The journal's file.
        records: All records, in order.

    Raises:
        StoreError: If a line other than an incomplete last one is damaged.
        OutputError: If the file cannot be read or truncated.
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
            raise self._output_error(error) from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a record and flushes it to the disk.

        Raises:
            OutputError: If it cannot be written; the journal is then unchanged.
        """
        text = json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
        line = _line_digest(text) + b" " + text + b"\n"
        try:
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, self._size)  # works on a full disk too
            raise self._output_error(error) from error
        self._size += len(line)
        self.records.append(dict(record))

    def _read(self, content: bytes) -> int:
        """Reads the complete lines into `records` and returns their size in bytes."""
        lines = content.split(b"\n")
        size = 0
        for number, line in enumerate(lines[:-1], start=1):
            digest, _, text = line.partition(b" ")
            if digest != _line_digest(text):
                if number < len(lines) - 1 or lines[-1]:
                    raise StoreError(
                        f"{self.path} is damaged in line {number}; what its run has done cannot be "
                        f"told. {self._advice}"
                    )
                break  # the last line, whose writing was interrupted
            self.records.append(json.loads(text))
            size += len(line) + 1
        return size

    def _output_error(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path} cannot be written: {error.strerror or error}. Give an output directory "
            "that can be written and has room."
        )


def _line_digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:_DIGITS].encode()
