"""A worker's saved part of a pass on the disk: written whole or not at all, and read again.

`checkpoints` says which parts there are and what becomes of them.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from ekfac_dist.errors import OutputError
from ekfac_dist.runtime.files import is_as_listed, safetensors_parts, write_listed, write_whole

PART = "part.json"
LOSS = "/loss"  # no module's name begins so
_NUMBERS = "numbers.safetensors"
_BUNDLE_BYTES = 2**28


class Sums(Protocol):
    """Running sums that can be saved and taken up again; see `LongSums`."""

    counts: dict[str, int]
    num_added: dict[str, int]

    def state(self) -> Mapping[str, Tensor]:
        """All that is summed so far, by name."""

    def restore(self, key: str, saved: Tensor) -> None:
        """Sets a piece to what was saved of it."""

    def add(self, key: str, saved: Tensor) -> None:
        """Adds a saved piece of other sums of the same."""


@dataclass(frozen=True)
class Identity:
    """Whose share of which way to share out, in which run."""

    run: str
    generation: int
    rank: int


@dataclass(frozen=True)
class Part:
    """One worker's saved state, as `part.json` tells it.

    Attributes:
        directory: Where it lies.
        generation: Of which way of sharing out.
        rank: Of which worker in it.
        steps: Steps of that worker that are in it.
        num_labels: Labels in it.
        seconds: Time that it took.
        counts: Numbers of rows in its sums, by factor.
        num_added: Terms of each sum since its last flush.
        files: {file: {bytes, sha256}}.
    """

    directory: Path
    generation: int
    rank: int
    steps: int
    num_labels: int
    seconds: float
    counts: Mapping[str, int]
    num_added: Mapping[str, int]
    files: Mapping[str, Mapping[str, Any]]

    @property
    def name(self) -> str:
        """Its directory's name, which tells it from every other."""
        return self.directory.name

    @classmethod
    def read(cls, directory: Path, run: str) -> "Part | None":
        """The part in a directory; None if it is not whole, or another run's."""
        try:
            digest, _, text = (directory / PART).read_text(encoding="utf-8").partition("\n")
            told = json.loads(text) if digest == _digest(text) else {}
        except (OSError, ValueError):
            return None
        if told.pop("run", None) != run:
            return None
        part = cls(directory, **told)
        return part if part.name == f"{part.generation}-{part.rank}-{part.steps}" else None

    @property
    def share(self) -> tuple[int, int]:
        """Whose share it is: its generation and its worker."""
        return self.generation, self.rank

    def is_whole(self) -> bool:
        """Whether every file has the size and the checksum that it had."""
        with suppress(OSError):
            return all(
                is_as_listed(self.directory / file, listed) for file, listed in self.files.items()
            )
        return False

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Its sums, and its loss, by name, a file at a time."""
        for file in self.files:
            if file != _NUMBERS:
                yield from load_file(self.directory / file).items()

    def numbers(self) -> list[int]:
        """The sequences that are in it."""
        return load_file(self.directory / _NUMBERS)["numbers"].tolist()


def write_part(
    directory: Path,
    identity: Identity,
    sums: Sums,
    loss: float,
    numbers: Sequence[int],
    *,
    steps: int,
    num_labels: int,
    seconds: float,
) -> None:
    """Saves running sums as they are; `part.json` last.

    Args:
        directory: Of the part; made.
        identity: Whose they are.
        sums: The sums.
        loss: Their loss.
        numbers: Which sequences are in them.
        steps: How many steps.
        num_labels: How many labels.
        seconds: What they took.

    Raises:
        OutputError: They cannot be written; nothing is left of the part.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{directory} cannot be made: {error.strerror or error}. Give an output directory that "
            "can be written and has room."
        ) from error
    held = {**sums.state(), LOSS: torch.tensor(loss, dtype=torch.float64)}
    bundles = {f"{k}.safetensors": bundle for k, bundle in enumerate(_bundles(held))}
    bundles[_NUMBERS] = {"numbers": torch.tensor(numbers, dtype=torch.int64)}
    try:
        files = {
            file: write_listed(directory / file, safetensors_parts(bundle))
            for file, bundle in bundles.items()
        }
        told = {
            **vars(identity),
            "steps": steps,
            "num_labels": num_labels,
            "seconds": seconds,
            "counts": dict(sums.counts),
            "num_added": dict(sums.num_added),
            "files": files,
        }
        text = json.dumps(told)
        write_whole(directory / PART, [f"{_digest(text)}\n{text}".encode()])
    except OutputError:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _bundles(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Groups of tensors for one file each, so that none has to be held twice as a whole."""
    bundle: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors.items():
        if bundle and held + tensor.nbytes > _BUNDLE_BYTES:
            yield bundle
            bundle, held = {}, 0
        bundle[name] = tensor
        held += tensor.nbytes
    yield bundle


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
