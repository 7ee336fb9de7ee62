"""One worker's saved part of a pass on the disk: written completely or not at all, and read.

Which parts there are, and which of them count, is decided by `checkpoints`.
"""

import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
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
    """Running sums that can be saved and restored; see `LongSums`."""

    counts: dict[str, int]
    num_added: dict[str, int]

    def state(self) -> Mapping[str, Tensor]:
        """All sums so far, by name."""

    def restore(self, piece: str, saved: Tensor) -> None:
        """Overwrites a piece with its saved values."""

    def add(self, piece: str, saved: Tensor) -> None:
        """Adds a piece that was saved from other sums of the same shape."""

    def holds(self, piece: str) -> bool:
        """Whether a piece belongs to one of these sums."""

    def require_beside(self, pieces: Collection[str]) -> None:
        """Marks what a saved state with these pieces lacks, if it is of an earlier version."""


@dataclass(frozen=True)
class Identity:
    """What a part belongs to.

    Attributes:
        run: The run.
        generation: The way of sharing out the remaining sequences.
        rank: The worker.
        shard: Number of workers that share one copy of the sums; their parts are of use together.
    """

    run: str
    generation: int
    rank: int
    shard: int = 1


@dataclass(frozen=True)
class Part:
    """One worker's saved state, as `part.json` describes it.

    Attributes:
        directory: Its directory.
        generation: The way of sharing out that it belongs to.
        rank: The rank of its worker.
        shard: Number of workers that share one copy of the sums.
        steps: Number of the worker's steps that are in the sums.
        num_labels: Number of labels in them.
        seconds: Time that they took.
        counts: Number of summed positions of each factor.
        num_added: Terms of each sum since its last flush.
        files: Size and SHA-256 of each file, {file: {bytes, sha256}}.
    """

    directory: Path
    generation: int
    rank: int
    shard: int
    steps: int
    num_labels: int
    seconds: float
    counts: Mapping[str, int]
    num_added: Mapping[str, int]
    files: Mapping[str, Mapping[str, Any]]

    @property
    def name(self) -> str:
        """Its directory's name, which no other part of the pass has."""
        return self.directory.name

    @classmethod
    def read(cls, directory: Path, run: str) -> "Part | None":
        """The part in a directory; None if it is incomplete or of another run."""
        try:
            digest, _, text = (directory / PART).read_text(encoding="utf-8").partition("\n")
            fields = json.loads(text) if digest == _text_digest(text) else {}
        except (OSError, ValueError):
            return None
        if fields.pop("run", None) != run:
            return None
        part = cls(directory, **{"shard": 1, **fields})
        return part if part.name == f"{part.generation}-{part.rank}-{part.steps}" else None

    @property
    def share(self) -> tuple[int, int]:
        """Its generation and rank."""
        return self.generation, self.rank

    @property
    def names(self) -> Collection[str]:
        """Names of the sums in it."""
        return self.num_added.keys()

    def is_whole(self) -> bool:
        """Whether every file still has its size and SHA-256."""
        with suppress(OSError):
            return all(
                is_as_listed(self.directory / file, listed) for file, listed in self.files.items()
            )
        return False

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Its sums and its loss, by name, read file by file."""
        for file in self.files:
            if file != _NUMBERS:
                yield from load_file(self.directory / file).items()

    def indices(self) -> list[int]:
        """Indices of the sequences that are in the sums."""
        return load_file(self.directory / _NUMBERS)["numbers"].tolist()


def write_part(
    directory: Path,
    identity: Identity,
    sums: Sums,
    loss: float,
    indices: Sequence[int],
    *,
    steps: int,
    num_labels: int,
    seconds: float,
) -> None:
    """Saves running sums; `part.json` is written last.

    Args:
        directory: The part's directory, which is made.
        identity: The run, generation and rank that they belong to.
        sums: The sums.
        loss: Σ −log p(label), in nats.
        indices: Indices of the sequences that are in them.
        steps: Number of steps.
        num_labels: Number of labels.
        seconds: Time that they took.

    Raises:
        OutputError: If they cannot be written; nothing is left of the part.
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
    bundles[_NUMBERS] = {"numbers": torch.tensor(indices, dtype=torch.int64)}
    try:
        files = {
            file: write_listed(directory / file, safetensors_parts(bundle))
            for file, bundle in bundles.items()
        }
        fields = {
            **vars(identity),
            "steps": steps,
            "num_labels": num_labels,
            "seconds": seconds,
            "counts": dict(sums.counts),
            "num_added": dict(sums.num_added),
            "files": files,
        }
        text = json.dumps(fields)
        write_whole(directory / PART, [f"{_text_digest(text)}\n{text}".encode()])
    except OutputError:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _bundles(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Groups of tensors, one for each file, small enough for a copy of one group in memory."""
    bundle: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors.items():
        if bundle and held + tensor.nbytes > _BUNDLE_BYTES:
            yield bundle
            bundle, held = {}, 0
        bundle[name] = tensor
        held += tensor.nbytes
    yield bundle


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
