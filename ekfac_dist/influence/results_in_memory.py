"""The files of `query`'s results without a disk, for a service; see `results` for their format."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor


@dataclass
class ResultsInMemory:
    """The results of a run, as `ResultsReader` reads them from a directory.

    Attributes:
        path: What errors call them.
        manifest: Their manifest.
    """

    path: str = "the answer"
    manifest: dict[str, Any] = field(default_factory=dict)
    _tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    _lines: dict[str, list[dict[str, Any]]] = field(default_factory=dict, repr=False)

    def has(self, file: str) -> bool:
        """Whether the run wrote that file."""
        return file in self._tensors or file in self._lines

    def tensors(self, file: str) -> dict[str, Tensor]:
        """Every tensor of a file, by name."""
        return self._tensors[file]

    def lines(self, file: str) -> list[dict[str, Any]]:
        """The object in each line of a file."""
        return self._lines[file]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(
            tensor.nbytes for tensors in self._tensors.values() for tensor in tensors.values()
        )


class ResultsToMemory:
    """Keeps results in memory; takes what `ResultsWriter` takes.

    Attributes:
        results: The results; complete once `finish` was called.
    """

    def __init__(self) -> None:
        self.results = ResultsInMemory()

    def tensors(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps the tensors of one file."""
        self.results._tensors[file] = dict(tensors)

    def lines(self, file: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keeps the lines of one file."""
        self.results._lines[file] = [_plain(row) for row in rows]

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Keeps the manifest, every entry but format, complete and files."""
        self.results.manifest = _plain(manifest)


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping as it is read again from a file."""
    return json.loads(json.dumps(value, allow_nan=False, default=_as_python))


def _as_python(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON")
