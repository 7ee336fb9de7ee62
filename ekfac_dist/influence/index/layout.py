"""The format of a gradient index: safetensors shards and one JSON manifest.

    manifest.json               factors, model, data, rank, dtype, and every shard with its checksum
    shard-00000.safetensors     indices [n]           index in the data of each sequence, int64
                                norms [n, modules, 2, dampings]   float32; see `norms`
                                <module>.u [n, c, O]  the gradients' products in the eigenbasis,
                                <module>.v [n, c, I]  G_n ≈ Σ_c u_c v_cᵀ

A shard holds consecutive sequences. How many depends on the sequences, on what is kept of each and
on the configured tokens of a step, so the files do not depend on the number of workers. Sequences
that are added later come into shards of their own.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ekfac_dist.influence.index.norms import DAMPINGS
from ekfac_dist.influence.preconditioned import rank_in
from ekfac_dist.models.modules import TrackedModule

FORMAT = "ekfac_dist/index/1"
INDICES, NORMS = "indices", "norms"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
REMEDY = "Copy the index again, or make it again with `index`."

# Time of the pass that makes an index, over that of a refit of the same data.
TIME_OVER_REFIT = 1.4

_SHARD_BYTES = 512 * 10**6
# Shards of what is made at once, if there is a step's work for each: an interruption loses a part
# of one for each worker. Fewer are a power of two, which 2, 4 or 8 workers can share out evenly.
_LEAST_SHARDS = 16


def shard_file(number: int) -> str:
    """Name of a shard's file."""
    return f"shard-{number:05d}.safetensors"


def left_key(module: str) -> str:
    """Name of the tensor with a module's u."""
    return f"{module}.u"


def right_key(module: str) -> str:
    """Name of the tensor with a module's v."""
    return f"{module}.v"


@dataclass(frozen=True)
class Shard:
    """One file of an index.

    Attributes:
        number: Its number.
        first: Place of its first sequence among all of the index.
        length: Number of its sequences, n.
    """

    number: int
    first: int
    length: int

    @property
    def file(self) -> str:
        """Name of its file."""
        return shard_file(self.number)

    @property
    def places(self) -> range:
        """Places of its sequences among all of the index."""
        return range(self.first, self.first + self.length)


def bytes_per_sequence(modules: Iterable[TrackedModule], rank: int, dtype: torch.dtype) -> int:
    """What an index keeps of a sequence, in bytes."""
    modules = list(modules)
    products = sum(
        rank_in(module, rank) * (module.num_outputs + module.input_size) for module in modules
    )
    return products * dtype.itemsize + len(modules) * 2 * len(DAMPINGS) * 4 + 8


def plan_shards(
    num_positions: np.ndarray, first: int, number: int, bytes_each: int, batch_tokens: int
) -> list[Shard]:
    """Cuts sequences into shards of about one size, few enough that steps are not cut short.

    Args:
        num_positions: Positions of every sequence of the index [N].
        first: Place of the first sequence that is in no shard yet.
        number: Number of the first shard.
        bytes_each: What is kept of a sequence.
        batch_tokens: The configured tokens of a step; a device's own may be fewer.
    """
    total = len(num_positions) - first
    most = max(1, _SHARD_BYTES // bytes_each)
    num_steps = int(num_positions[first:].sum()) // batch_tokens
    least = 2 ** int(math.log2(min(_LEAST_SHARDS, max(1, num_steps))))
    num_shards = min(total, max(least, math.ceil(total / most)))
    ends = [first + total * k // num_shards for k in range(num_shards + 1)] if total else []
    return [
        Shard(number + k, start, end - start)
        for k, (start, end) in enumerate(itertools.pairwise(ends))
    ]


def shapes(
    shard: Shard, modules: Sequence[TrackedModule], rank: int, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of a shard, by its name."""
    n = shard.length
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        INDICES: ((n,), torch.int64),
        NORMS: ((n, len(modules), 2, len(DAMPINGS)), torch.float32),
    }
    for module in modules:
        own_rank = rank_in(module, rank)
        expected[left_key(module.name)] = (n, own_rank, module.num_outputs), dtype
        expected[right_key(module.name)] = (n, own_rank, module.input_size), dtype
    return expected


def shard_of(entry: Any, number: int, first: int) -> Shard | None:
    """The shard of an entry of the manifest; None if the entry is not whole.

    Args:
        entry: The entry.
        number: The shard's number.
        first: Place of its first sequence.
    """
    kinds = {"file": str, "sequences": int, "bytes": int, "sha256": str}
    if not isinstance(entry, dict) or any(type(entry.get(k)) is not t for k, t in kinds.items()):
        return None
    shard = Shard(number, first, entry["sequences"])
    return shard if entry["file"] == shard.file and shard.length > 0 else None
