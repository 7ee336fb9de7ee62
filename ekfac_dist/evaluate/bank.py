"""A bank: the queries' losses after training on subsets of the data.

    BANK/
      manifest.json                 recipe, seed, and fingerprints of start, data and queries
      losses/<digest>.safetensors   kept   [N] uint8         1 where a sequence was trained on
                                    losses [queries] float64 −log p of each query, in nats
                                    header: steps, first_loss, last_loss, seconds

A file's name is a digest of its `kept`, so a subset is trained on once, whoever asks for it. Files
are whole as soon as they exist; a run that was interrupted goes on with those that are missing. A
bank belongs to one recipe, start, data and set of queries, and says so when it is opened with
another.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ekfac_dist.errors import StoreError
from ekfac_dist.evaluate.training import Trained
from ekfac_dist.factors.directory import make_folders
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.files import safetensors_parts, write_whole
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.progress import Progress

FORMAT = "ekfac_dist-bank/1"
MANIFEST = "manifest.json"
_FOLDER = "losses"
_DIGITS = 24  # of a SHA-256, in a file's name


@dataclass(frozen=True)
class BankKey:
    """What all of a bank's models have in common.

    Attributes:
        recipe: The recipe's settings.
        seed: The seed of training.
        start: SHA-256 of the initial weights.
        data: SHA-256 of the sequences.
        queries: SHA-256 of the queries' sequences.
    """

    recipe: dict[str, Any]
    seed: int
    start: str
    data: str
    queries: str

    def as_dict(self) -> dict[str, Any]:
        """As it is written into the manifest, one level of names."""
        recipe = {f"training.{name}": value for name, value in self.recipe.items()}
        others = {name: getattr(self, name) for name in ("seed", "start", "data", "queries")}
        return {**recipe, **others}


_NAMES = {
    "start": "initial weights, by fingerprint",
    "data": "sequences, by fingerprint",
    "queries": "queries, by fingerprint",
}


class Bank:
    """The bank in a directory, which is made if it is not there.

    Args:
        path: Its directory.
        key: What its models have in common.

    Raises:
        StoreError: If the directory holds a bank of something else, or a damaged one.
        OutputError: If it cannot be written.
    """

    def __init__(self, path: Path, key: BankKey) -> None:
        self.path = path
        manifest = path / MANIFEST
        if manifest.is_file():
            self._require_same(manifest, key.as_dict())
            return
        make_folders(path, _FOLDER)
        content = {"format": FORMAT, **key.as_dict()}
        write_whole(manifest, [json.dumps(content, indent=1).encode() + b"\n"])

    @staticmethod
    def _require_same(manifest: Path, key: dict[str, Any]) -> None:
        bank = manifest.parent
        try:
            stored = json.loads(manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(
                f"The bank's manifest {manifest} cannot be read. Copy it again, or move {bank} "
                "away and the models are trained anew."
            ) from error
        if not isinstance(stored, dict) or stored.pop("format", None) != FORMAT:
            raise StoreError(f"{bank} is no {FORMAT} bank; give another output directory.")
        for name in dict.fromkeys([*key, *stored]):
            one, two = stored.get(name), key.get(name)
            if one != two:
                raise StoreError(
                    f"The bank {bank} was made with other settings ({_NAMES.get(name, name)}: "
                    f"{_shown(one)} there, {_shown(two)} here); nothing of it was changed. Give "
                    "another output directory, or the settings that it was made with."
                )

    def has(self, kept: np.ndarray) -> bool:
        """Whether the losses after training on a subset are known; `kept` is bool [N]."""
        return self._file(kept).is_file()

    def put(self, kept: np.ndarray, losses: np.ndarray, trained: Trained, seconds: float) -> None:
        """Stores the losses after training on a subset.

        Args:
            kept: Whether each sequence was trained on, bool [N].
            losses: −log p of each query [queries], float64.
            trained: What training did.
            seconds: How long it took.

        Raises:
            OutputError: If the file cannot be written.
        """
        tensors = {
            "kept": torch.from_numpy(kept.astype(np.uint8)),
            "losses": torch.from_numpy(losses),
        }
        header = {
            "steps": str(trained.steps),
            "first_loss": repr(trained.first_loss),
            "last_loss": repr(trained.last_loss),
            "seconds": f"{seconds:.3f}",
        }
        write_whole(self._file(kept), safetensors_parts(tensors, header))

    def losses(self, subsets: np.ndarray) -> np.ndarray:
        """The queries' losses after training on each of some subsets.

        Args:
            subsets: Whether each sequence is kept, bool [subsets, N].

        Returns:
            −log p, float64 [subsets, queries], in nats.

        Raises:
            StoreError: If a file is missing or damaged.
        """
        return np.stack([self._read(kept)[0] for kept in subsets])

    def trained(self, kept: np.ndarray) -> Trained:
        """What training on a subset did.

        Raises:
            StoreError: If the file is missing or damaged.
        """
        header = self._read(kept)[1]
        first, last = float(header["first_loss"]), float(header["last_loss"])
        return Trained(int(header["steps"]), first, last)

    def seconds(self, subsets: np.ndarray) -> float:
        """How long training on some subsets took, all together."""
        return sum(float(self._read(kept)[1]["seconds"]) for kept in subsets)

    def _file(self, kept: np.ndarray) -> Path:
        digest = hashlib.sha256(f"{len(kept)}|".encode() + np.packbits(kept).tobytes()).hexdigest()
        return self.path / _FOLDER / f"{digest[:_DIGITS]}.safetensors"

    def _read(self, kept: np.ndarray) -> tuple[np.ndarray, dict[str, str]]:
        file = self._file(kept)
        try:
            with safe_open(file, framework="np") as opened:
                stored, losses = opened.get_tensor("kept"), opened.get_tensor("losses")
                header = opened.metadata() or {}
        except (OSError, SafetensorError, ValueError) as error:
            raise StoreError(
                f"{file} of the bank is missing or damaged; remove it, and run the same again."
            ) from error
        if not np.array_equal(stored.astype(bool), kept):
            raise StoreError(f"{file} of the bank is of another subset; remove it, and run again.")
        return losses, header


def fill(
    bank: Bank,
    subsets: np.ndarray,
    world: World,
    retrain: Callable[[np.ndarray, Callable[[], None]], tuple[np.ndarray, Trained]],
    steps_of: Callable[[np.ndarray], int],
    name: str,
) -> None:
    """Trains on those of some subsets that a bank lacks, shared out over the workers; a collective.

    Args:
        bank: The bank, in a directory that all workers see.
        subsets: Whether each sequence is kept, bool [subsets, N].
        world: The workers.
        retrain: Trains on a subset, and returns the queries' losses; calls its second argument
            before each step.
        steps_of: Number of steps of training on a subset.
        name: The stage's name in progress.

    Raises:
        Preempted: If SIGTERM has come; models that are finished are stored.
        UserError: As `retrain` raises it, on every worker.
    """
    missing = world.share(_missing(bank, subsets) if world.is_main else None)
    assert missing is not None
    own = missing[world.rank :: world.size]
    total = sum(steps_of(subsets[k]) for k in own)
    whole = sum(steps_of(subsets[k]) for k in missing), len(missing)
    shown = world.is_main and bool(own)
    bar = Progress(name, total=total, unit="steps", whole=whole, enabled=shown)
    with world.agree(), bar as progress:

        def on_step() -> None:
            world.check_peers()
            if preemption.requested():
                raise preemption.ended("the bank's finished models are stored")
            progress.update(1)

        for k in own:
            start = time.perf_counter()
            losses, trained = retrain(subsets[k], on_step)
            bank.put(subsets[k], losses, trained, time.perf_counter() - start)


def _missing(bank: Bank, subsets: np.ndarray) -> Sequence[int]:
    """Indices of the subsets that the bank lacks; of equal ones the first."""
    first = {kept.tobytes(): k for k, kept in reversed(list(enumerate(subsets)))}
    return [k for k in sorted(first.values()) if not bank.has(subsets[k])]


def _shown(value: object) -> str:
    text = repr(value)
    return f"{text[:16]}…" if len(text) > 60 else text
