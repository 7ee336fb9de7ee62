"""Reading a finished index: the manifest at once, shards one by one, memory-mapped."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ekfac_dist.config import DataConfig
from ekfac_dist.config.query import QueryDataConfig
from ekfac_dist.data.examples import Examples
from ekfac_dist.errors import StoreError, first_line
from ekfac_dist.factors.factors import Factors
from ekfac_dist.factors.layout import CHECKSUM, MANIFEST, STATE, manifest_checksum, read_manifest
from ekfac_dist.influence.index import layout
from ekfac_dist.influence.index.layout import DTYPES, FORMAT, INDICES, NORMS, REMEDY, Shard
from ekfac_dist.influence.index.norms import DAMPINGS
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.runtime.files import file_sha256, read_ahead

_ENTRIES: dict[str, dict[str, type]] = {
    "factors": {"fingerprint": str},
    "model": {"whole": str, "dtype": str},
    "data": {"fingerprint": str, "num_sequences": int, "num_rows": int, "config": dict},
    "index": {"rank": int, "dtype": str},
    "norms": {"dampings": list, "mean_lambda": dict},
}


class GradientIndex:
    """A finished index.

    Args:
        path: Its directory.
        factors: The factors in whose eigenbasis it is.
        verify: Whether to check each shard's SHA-256 before it is read for the first time.

    Attributes:
        path: Its directory.
        manifest: Its manifest.
        modules: The modules, in model order.
        rank: Most outer products of a gradient in a module.
        dtype: Their dtype.
        shards: Its shards, in order.

    Raises:
        StoreError: If it is missing, unfinished, damaged, of another format or of other factors.
    """

    def __init__(self, path: str | Path, factors: Factors, *, verify: bool = True) -> None:
        self.path, self._verify, self._verified = Path(path), verify, set[str]()
        self._open: ExitStack | None = None
        self._kept: dict[str, OpenShard] = {}  # by file
        self.manifest = self._read_manifest()
        fitted = self.manifest["factors"]
        if fitted["fingerprint"] != factors.fingerprint:
            raise StoreError(
                f"The index {path} was made with other factors ({fitted.get('path')}, "
                f"{fitted['fingerprint'][:12]}…) than those given ({factors.fingerprint[:12]}…); "
                "give those, or make another index."
            )
        self.modules: tuple[TrackedModule, ...] = tuple(factors.modules.values())
        kept = self.manifest["index"]
        means = self.mean_lambdas
        if any(type(means.get(module.name)) is not float for module in self.modules):
            raise StoreError(
                f"{self.path / MANIFEST} is damaged: its norms are not whole. {REMEDY}"
            )
        self.rank = kept["rank"]
        self.dtype = DTYPES[kept["dtype"]]
        self.shards = self._shards()

    def _read_manifest(self) -> dict[str, Any]:
        """The manifest, checked."""
        path, file = self.path, self.path / MANIFEST
        if not file.is_file():
            unfinished = (path / STATE).is_dir()
            raise StoreError(
                f"{path} holds no finished index: its run did not end. Run the same `index` again, "
                "which goes on."
                if unfinished
                else f"{path} has no {MANIFEST}; give the output directory of an `index` run."
            )
        try:
            manifest = read_manifest(path)
        except StoreError as error:
            raise StoreError(f"{error} {REMEDY}") from error
        if manifest.get("format") != FORMAT:
            raise StoreError(
                f"{path} has format {manifest.get('format')!r}; this version reads {FORMAT!r}, the "
                "output of an `index` run."
            )
        if manifest.get(CHECKSUM) != manifest_checksum(manifest):
            raise StoreError(
                f"{file} is damaged: what it says has changed since it was written. {REMEDY}"
            )
        for name, fields in _ENTRIES.items():
            entry = manifest.get(name)
            whole = isinstance(entry, dict) and all(
                type(entry.get(field)) is kind for field, kind in fields.items()
            )
            if not whole:
                raise StoreError(f"{file} is damaged: its {name} is not whole. {REMEDY}")
        if manifest["index"]["dtype"] not in DTYPES or manifest["index"]["rank"] < 1:
            raise StoreError(f"{file} is damaged: its index is not whole. {REMEDY}")
        if manifest["norms"]["dampings"] != list(DAMPINGS):
            raise StoreError(
                f"{path} has norms for other dampings than this version reads; make it again with "
                "`index`."
            )
        return manifest

    def _shards(self) -> list[Shard]:
        """The shards, whose files are there and of the listed size."""
        listed, first = self.manifest.get("shards"), 0
        shards: list[Shard] = []
        for number, entry in enumerate(listed if isinstance(listed, list) else []):
            shard = layout.shard_of(entry, number, first)
            if shard is None:
                raise StoreError(
                    f"{self.path / MANIFEST} is damaged: its shard {number} is {entry!r}. {REMEDY}"
                )
            file = self.path / shard.file
            size = file.stat().st_size if file.is_file() else None
            if size != entry["bytes"]:
                what = "is missing" if size is None else f"has {size} bytes, not {entry['bytes']}"
                raise StoreError(f"{file} {what}: the index is damaged. {REMEDY}")
            shards.append(shard)
            first += shard.length
        if first != self.manifest["data"]["num_sequences"] or not first:
            raise StoreError(
                f"{self.path / MANIFEST} is damaged: its shards have {first} sequences together. "
                f"{REMEDY}"
            )
        return shards

    def __len__(self) -> int:
        return self.manifest["data"]["num_sequences"]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the manifest, and so over each shard's SHA-256."""
        return str(self.manifest[CHECKSUM])

    @property
    def num_bytes(self) -> int:
        """Size of all shards, in bytes."""
        return sum(entry["bytes"] for entry in self.manifest["shards"])

    def data_config(self, given: QueryDataConfig) -> DataConfig:
        """The index's data, with the fields that are given in its place.

        Of a source that has grown since, the rows that the index has, so that it answers until
        `index --add` has added the others.

        Raises:
            ConfigError: As of `QueryDataConfig.over`.
        """
        own = dict(self.manifest["data"]["config"])
        # With windows, a row of the source is several of the index.
        if given.source is None and own.get("max_sequences") is None and not own.get("window"):
            own["max_sequences"] = self.manifest["data"]["num_rows"]
        return given.over(own)

    def require_data(self, sequences: Examples) -> None:
        """Refuses sequences that are not those of the index.

        Raises:
            StoreError: If they are others.
        """
        if sequences.fingerprint != self.manifest["data"]["fingerprint"]:
            own, given = self.manifest["data"], int(sequences.num_positions.sum())
            raise StoreError(
                f"The index {self.path} was made of other data ({len(self)} sequences, "
                f"{own['num_positions']} positions) than these ({len(sequences)}, {given}); leave "
                "data.* out, which gives the index's own, add new sequences with `index --add`, or "
                "make another index."
            )

    def require_model(self, whole: str) -> None:
        """Refuses a model whose gradients are not those of the index.

        Args:
            whole: SHA-256 of all weights of the model.

        Raises:
            StoreError: If it is another.
        """
        stored = self.manifest["model"]["whole"]
        if whole != stored:
            raise StoreError(
                f"The index {self.path} was made with another model ({stored[:12]}…, "
                f"{self.manifest['model']['dtype']}) than this one ({whole[:12]}…); give that "
                "model, in that dtype, or make another index."
            )

    def check_shards(self, rank: int, workers: int) -> None:
        """Compares a worker's share of the shards with their checksums.

        Args:
            rank: The worker's rank.
            workers: W; when each has checked its share, none reads a shard to check it again.

        Raises:
            StoreError: If one is damaged.
        """
        for shard in self.shards[rank::workers]:
            self._check(shard)
        self._verified.update(shard.file for shard in self.shards)

    def _check(self, shard: Shard) -> None:
        """Compares a shard with its checksum, if that has not been done."""
        file = self.path / shard.file
        if not self._verify or shard.file in self._verified:
            return
        try:
            digest = file_sha256(file)
        except OSError as error:
            raise StoreError(f"{file} cannot be read: {error.strerror}. {REMEDY}") from error
        if digest != self.manifest["shards"][shard.number]["sha256"]:
            raise StoreError(
                f"{file} is damaged: its SHA-256 is not the one in the manifest. {REMEDY}"
            )
        self._verified.add(shard.file)

    @contextmanager
    def kept_open(self) -> Iterator[None]:
        """Context in which shards that are scored from stay open, and mapped into memory.

        To map a file's pages, and to unmap them, takes as long as half of a scan.
        """
        with ExitStack() as stack:
            self._open = stack
            try:
                yield
            finally:
                self._open = None
                self._kept.clear()

    def opened(self, shard: Shard) -> AbstractContextManager["OpenShard"]:
        """A shard to score from, checked; in `kept_open` it stays open.

        Raises:
            StoreError: If it is damaged.
        """
        if self._open is None:
            return self.open(shard)
        if shard.file not in self._kept:
            self._kept[shard.file] = self._open.enter_context(self.open(shard))
        return nullcontext(self._kept[shard.file])

    @contextmanager
    def open(self, shard: Shard, *, checks: bool = True) -> Iterator["OpenShard"]:
        """Opens one shard.

        Args:
            shard: The shard.
            checks: Whether to compare it with its checksum first. What is read of all shards by
                every worker is not: each shard is checked by the worker that scores from it.

        Raises:
            StoreError: If it is damaged.
        """
        file = self.path / shard.file
        if checks:
            self._check(shard)
            read_ahead(file)
        expected = layout.shapes(shard, self.modules, self.rank, self.dtype)
        try:
            with safe_open(file, framework="pt") as opened:
                yield OpenShard(file, opened, expected)
        except (SafetensorError, OSError) as error:
            raise StoreError(
                f"{file} is no whole safetensors file: {first_line(error)}. {REMEDY}"
            ) from error

    @cached_property
    def indices(self) -> np.ndarray:
        """Index in the data of every sequence, in the index's order [N]."""
        parts = []
        for shard in self.shards:
            with self.open(shard, checks=False) as opened:
                parts.append(opened.tensor(INDICES).numpy().copy())
        indices = np.concatenate(parts)
        if len(indices) > 1 and not (np.diff(indices) > 0).all():
            raise StoreError(f"{self.path}: its sequences are not in the data's order. {REMEDY}")
        return indices

    def norms(self) -> Iterator[Tensor]:
        """The norms of each shard's sequences [n, modules, 2, dampings]; see `norms`."""
        for shard in self.shards:
            with self.open(shard, checks=False) as opened:
                yield opened.tensor(NORMS)

    @property
    def mean_lambdas(self) -> dict[str, float]:
        """mean(Λ) of each module, which dampings are multiples of."""
        return dict(self.manifest["norms"]["mean_lambda"])


class OpenShard:
    """One shard, memory-mapped.

    Args:
        file: Its file, for errors.
        opened: The file, opened by safetensors.
        expected: Shape and dtype of each of its tensors.
    """

    def __init__(
        self,
        file: Path,
        opened: Any,
        expected: dict[str, tuple[tuple[int, ...], torch.dtype]],
    ) -> None:
        self._file, self._opened, self._expected = file, opened, expected
        self._names = set(opened.keys())
        self._tensors: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        """One tensor; its memory is the file's.

        Raises:
            StoreError: If it is missing, or of another shape or dtype.
        """
        if name not in self._tensors:
            self._tensors[name] = self._read(name)
        return self._tensors[name]

    def _read(self, name: str) -> Tensor:
        if name not in self._names:
            raise StoreError(f"{self._file} holds no tensor {name!r}. {REMEDY}")
        tensor: Tensor = self._opened.get_tensor(name)
        shape, dtype = self._expected[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise StoreError(
                f"{self._file}: {name} is {tensor.dtype} of shape {list(tensor.shape)}; it must be "
                f"{dtype} of {list(shape)}. {REMEDY}"
            )
        return tensor
