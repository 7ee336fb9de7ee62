"""Scores from an index: its products in the place of the training data's rows.

A sequence of an index is one of c positions, with gradients u_c and inputs v_c: the observer that
scores training sequences scores these too. Shards are read in order, each once for all queries of a
block, by a thread that is ahead of the products. They are shared out over the workers.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.data.batches import to_device
from ekfac_dist.data.examples import Examples
from ekfac_dist.errors import NonFiniteError, StoreError
from ekfac_dist.influence.context import OVERFLOW_ADVICE, STORED, ScoringContext
from ekfac_dist.influence.index import layout, norms
from ekfac_dist.influence.index.layout import Shard
from ekfac_dist.influence.index.reader import GradientIndex, OpenShard
from ekfac_dist.influence.scan import Scan
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.prefetch import prefetch
from ekfac_dist.runtime.progress import Progress

# What is read at a time, in bytes as stored.
_PIECE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class KeptSequences:
    """Some sequences of an index, as the positions of a batch.

    Attributes:
        indices: Index in the data of each sequence [n].
        lengths: Products of each sequence [n].
    """

    indices: Sequence[int]
    lengths: tuple[int, ...]
    offsets: np.ndarray | None = None
    are_copies = True
    sender = 0

    @property
    def num_positions(self) -> int:
        """Products of all sequences together."""
        return sum(self.lengths)


@dataclass(frozen=True)
class _Piece:
    """What is read at a time: some modules of a shard.

    Attributes:
        shard: The shard.
        modules: The modules.
        share: Their share of the shard's bytes.
    """

    shard: Shard
    modules: Sequence[TrackedModule]
    share: float


class IndexScan:
    """Scores the scored sequences from an index.

    Args:
        context: Model, factors, damping, workers.
        index: The index.
        scored: The scored sequences, all of which the index has.

    Raises:
        StoreError: If it lacks one.
    """

    def __init__(self, context: ScoringContext, index: GradientIndex, scored: Examples) -> None:
        self._context, self.index = context, index
        self._scored = scored.indices
        places = np.searchsorted(index.indices, self._scored)
        found = index.indices[np.minimum(places, len(index) - 1)] == self._scored
        if not found.all():
            missing = int(self._scored[~found][0])
            raise StoreError(
                f"The index {index.path} lacks sequence {missing} of the data; add it with "
                "`index --add`, or leave the index out."
            )
        self._places = places

    def norms(self) -> Tensor:
        """⟨G, (F + λ)⁻¹ G⟩ and ‖(F + λ)⁻¹ G‖² of the whole gradients [2, N], float64.

        Raises:
            ConfigError: If the index does not know norms for the context's damping.
        """
        stored = self.index.norms()[torch.from_numpy(self._places)]
        means = self.index.manifest["norms"]["mean_lambda"]
        return norms.at_dampings(stored, self._context.modules, means, self._context.damping)

    def run(self, name: str, scan: Scan) -> None:
        """Shows every scored sequence to a scan, and sums its scores over the workers.

        Args:
            name: What the work is called in progress and errors.
            scan: Takes the products.
        """
        context, world = self._context, self._context.world
        shards = self._own_shards()
        num_all = len(self.index)
        progress = Progress(
            name,
            total=sum(shard.length for shard in shards),
            unit="sequences",
            whole=(num_all, num_all),
            enabled=context.show_progress and world.is_main,
        )
        with world.agree(), progress, torch.no_grad(), ExitStack() as stack:
            reader = _ShardReader(self.index, stack)
            pieces = list(self._pieces(shards))
            for piece, tensors in zip(pieces, prefetch(reader.read, pieces), strict=True):
                for module, (left, right) in zip(piece.modules, tensors, strict=True):
                    self._score(scan, piece.shard, module, left, right)
                progress.update(piece.share * piece.shard.length)
                world.check_peers()
                if preemption.requested():
                    raise preemption.ended(STORED)
            if not torch.isfinite(scan.health()):
                raise NonFiniteError(
                    f"{name}: scores from the index {self.index.path} are NaN or infinite. "
                    f"{OVERFLOW_ADVICE}."
                )
        scan.reduce(world)

    def _score(
        self, scan: Scan, shard: Shard, module: TrackedModule, left: Tensor, right: Tensor
    ) -> None:
        """Shows a module's products of the scored sequences of a shard to a scan."""
        context = self._context
        left_ncO = to_device(left, context.world.device).to(context.dtype)
        right_ncI = to_device(right, context.world.device).to(context.dtype)
        own = self.index.indices[shard.places]
        is_scored = np.isin(own, self._scored, assume_unique=True)
        if not is_scored.all():
            rows = torch.from_numpy(np.flatnonzero(is_scored)).to(context.world.device)
            left_ncO, right_ncI, own = left_ncO[rows], right_ncI[rows], own[is_scored]
        if len(own):
            lengths = (left_ncO.shape[1],) * len(own)
            batch = KeptSequences(own.tolist(), lengths)
            scan.score(module, right_ncI.flatten(0, 1), left_ncO.flatten(0, 1), batch)

    def _own_shards(self) -> list[Shard]:
        """The shards that this worker reads, with the others of its copy of the factors."""
        context = self._context
        copies = context.world.size // context.shard
        return self.index.shards[context.world.rank // context.shard :: copies]

    def _pieces(self, shards: Sequence[Shard]) -> Iterator[_Piece]:
        """Some shards, cut into pieces of about `_PIECE_BYTES`."""
        index = self.index
        sizes = {
            module.name: layout.bytes_per_sequence([module], index.rank, index.dtype)
            for module in self._context.own_modules
        }
        total = sum(sizes.values())
        for shard in shards:
            some: list[TrackedModule] = []
            held = 0
            for module in self._context.own_modules:
                some.append(module)
                held += sizes[module.name]
                if held * shard.length >= _PIECE_BYTES:
                    yield _Piece(shard, some, held / total)
                    some, held = [], 0
            if some:
                yield _Piece(shard, some, held / total)


class _ShardReader:
    """Reads pieces in order, in one thread, with one shard open at a time.

    Args:
        index: The index.
        stack: Closes the last shard.
    """

    def __init__(self, index: GradientIndex, stack: ExitStack) -> None:
        self._index, self._stack = index, stack
        self._shard: Shard | None = None
        self._opened: OpenShard | None = None

    def read(self, piece: _Piece) -> list[tuple[Tensor, Tensor]]:
        """U and v of a piece's modules, in memory."""
        if piece.shard is not self._shard or self._opened is None:
            self._stack.close()
            self._opened = self._stack.enter_context(self._index.open(piece.shard))
            self._shard = piece.shard
        opened = self._opened
        return [
            (
                opened.tensor(layout.left_key(module.name)).clone(),
                opened.tensor(layout.right_key(module.name)).clone(),
            )
            for module in piece.modules
        ]
