"""Scores from an index: its products in the place of the training data's rows.

A sequence of an index is one of c positions, with gradients u_c and inputs v_c: the observer that
scores training sequences scores these too. Shards are read in order, each once for all queries of a
block, by a thread that is ahead of the products. They are shared out over the workers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.curvature.float32_products import has_16_bit_units
from ekfac_dist.data.batches import to_device
from ekfac_dist.data.examples import Examples
from ekfac_dist.errors import NonFiniteError, StoreError
from ekfac_dist.influence.asking import ScanStopped
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
        is_first: Whether it is the shard's first.
    """

    shard: Shard
    modules: Sequence[TrackedModule]
    share: float
    is_first: bool


class _Shown:
    """The scored sequences of a shard.

    Args:
        indices: Index in the data of each [n].
        chosen: Which of the shard's sequences they are [n]; None: all.

    Attributes:
        chosen: As given.
    """

    def __init__(self, indices: Sequence[int], chosen: Tensor | None) -> None:
        self._indices, self.chosen = indices, chosen
        self._batches: dict[int, KeptSequences] = {}

    def batch(self, num_products: int) -> KeptSequences:
        """Them, in a module that keeps so many products of each."""
        if num_products not in self._batches:
            lengths = (num_products,) * len(self._indices)
            self._batches[num_products] = KeptSequences(self._indices, lengths)
        return self._batches[num_products]


class IndexScan:
    """Scores the scored sequences from an index.

    Args:
        context: Model, factors, damping, workers.
        index: The index.
        scored: The scored sequences, all of which the index has.
        with_norms: Whether norms will be asked for.

    Raises:
        ConfigError: If they will be, and the index does not know them for the context's damping.
        StoreError: If it lacks a sequence.
    """

    def __init__(
        self,
        context: ScoringContext,
        index: GradientIndex,
        scored: Examples,
        *,
        with_norms: bool,
    ) -> None:
        self._context, self.index = context, index
        self._scored = scored.indices
        if with_norms:
            norms.require_known(context.modules, index.mean_lambdas, context.damping)
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

        It is a collective.

        Raises:
            StoreError: If a shard is damaged.
        """
        context, means = self._context, self.index.mean_lambdas
        with context.world.agree():
            parts = [
                norms.at_dampings(of_shard, context.modules, means, context.damping)
                for of_shard in self.index.norms()
            ]
        return torch.cat(parts, 1)[:, torch.from_numpy(self._places)]

    def run(self, name: str, scan: Scan, go_on: Callable[[], bool] | None = None) -> None:
        """Shows every scored sequence to a scan, and sums its scores over the workers.

        Args:
            name: What the work is called in progress and errors.
            scan: Takes the products.
            go_on: A collective that is called before each shard; false on all workers if nobody
                wants the scores any more.

        Raises:
            ScanStopped: If `go_on` is false.
        """
        context, world = self._context, self._context.world
        rounds = self._rounds()
        num_all = len(self._places)
        progress = Progress(
            name,
            total=sum(shard.length for shard in rounds if shard is not None),
            unit="sequences",
            whole=(num_all, num_all),
            enabled=context.show_progress and world.is_main,
        )
        # A block with collectives in it is left at once by a worker that fails.
        agreed, is_stopped = world.agree(together=None if go_on is None else ()), False
        with agreed, progress, torch.no_grad(), ExitStack() as stack:
            self._choose_dtype(scan)
            reader = stack.enter_context(_ShardReader(self.index, scan.dtype, world.device))
            pieces = [piece for shard in rounds for piece in self._pieces(shard)]
            wanted = [piece for piece in pieces if piece is not None]
            # Its thread has ended before the shard that it reads is closed.
            ahead = stack.enter_context(closing(prefetch(reader.read, wanted)))
            for piece in pieces:
                if (piece is None or piece.is_first) and go_on is not None and not go_on():
                    is_stopped = True
                    break
                if piece is None:
                    continue
                if piece.is_first:
                    shown = self._shown(piece.shard)
                for module, products in zip(piece.modules, next(ahead), strict=True):
                    self._score(scan, shown, module, *products)
                progress.update(piece.share * piece.shard.length)
                world.check_peers()
                if preemption.requested():
                    raise preemption.ended(STORED)
        if is_stopped:
            raise ScanStopped
        are_finite = world.gather(bool(torch.isfinite(scan.health())))
        with world.agree():
            if not all(are_finite):
                raise NonFiniteError(
                    f"{name}: scores from the index {self.index.path} are NaN or infinite. "
                    f"{OVERFLOW_ADVICE}."
                )
        scan.reduce(world)

    def _choose_dtype(self, scan: Scan) -> None:
        """Lets a scan take products as they are stored where that is faster.

        A score is a sum over products and modules, of terms with errors of their own: those of a
        16-bit dtype are far below what a few products for a gradient leave out.
        """
        context, index = self._context, self.index
        is_faster = context.dtype == torch.float32 and has_16_bit_units(
            context.world.device, index.dtype
        )
        lengths = [index.rank] * max((shard.length for shard in index.shards), default=1)
        if is_faster and scan.is_by_position(lengths):
            scan.take_in(index.dtype)

    def _shown(self, shard: Shard) -> "_Shown":
        """The scored sequences of a shard."""
        first, last = np.searchsorted(self._places, [shard.first, shard.places.stop])
        rows = self._places[first:last] - shard.first
        chosen = None
        if len(rows) < shard.length:
            chosen = torch.from_numpy(rows).to(self._context.world.device)
        return _Shown(self._scored[first:last].tolist(), chosen)

    def _score(self, scan: Scan, shown: "_Shown", module: TrackedModule, *products: Tensor) -> None:
        """Shows a module's products U and V of a shard's scored sequences to a scan."""
        device, dtype = self._context.world.device, scan.dtype
        left_ncO, right_ncI = (to_device(one, device).to(dtype) for one in products)
        if shown.chosen is not None:
            left_ncO, right_ncI = left_ncO[shown.chosen], right_ncI[shown.chosen]
        batch = shown.batch(left_ncO.shape[1])
        scan.score(module, right_ncI.flatten(0, 1), left_ncO.flatten(0, 1), batch)

    def _rounds(self) -> list[Shard | None]:
        """The shards that this worker reads, with the others of its copy of the factors.

        Every worker has as many rounds; None where it has no shard left.
        """
        context = self._context
        held = np.array([shard.first for shard in self.index.shards]).searchsorted(
            self._places, "right"
        )
        shards = [self.index.shards[number - 1] for number in np.unique(held)]
        copies = context.world.size // context.shard
        own = shards[context.world.rank // context.shard :: copies]
        return [*own, *[None] * (-(-len(shards) // copies) - len(own))]

    def _pieces(self, shard: Shard | None) -> Iterator["_Piece | None"]:
        """A shard cut into pieces of about `_PIECE_BYTES`; None for none."""
        index, own = self.index, self._context.own_modules
        if shard is None or not own:
            yield None
            return
        sizes = [layout.bytes_per_sequence([module], index.rank, index.dtype) for module in own]
        some: list[TrackedModule] = []
        held, is_first = 0, True
        for module, size in zip(own, sizes, strict=True):
            some.append(module)
            held += size
            if held * shard.length >= _PIECE_BYTES or module is own[-1]:
                yield _Piece(shard, some, held / sum(sizes), is_first)
                some, held, is_first = [], 0, False


class _ShardReader:
    """Reads pieces in order, in one thread, with one shard open at a time.

    Args:
        index: The index.
        dtype: In which products are scored; a CPU's are converted to it here.
        device: Where they are scored.
    """

    def __init__(self, index: GradientIndex, dtype: torch.dtype, device: torch.device) -> None:
        self._index, self._open = index, ExitStack()
        is_cpu = device.type == "cpu"
        self._dtype = dtype if is_cpu else index.dtype
        self._copies = not is_cpu or dtype != index.dtype
        self._shard: Shard | None = None
        self._opened: OpenShard | None = None

    def __enter__(self) -> "_ShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def read(self, piece: _Piece) -> list[tuple[Tensor, Tensor]]:
        """U and V of a piece's modules.

        In memory; or in the file's, which is on its way there, if a CPU multiplies what is stored.
        """
        if piece.shard is not self._shard or self._opened is None:
            self._open.close()
            self._opened = self._open.enter_context(self._index.opened(piece.shard))
            self._shard = piece.shard
        opened, dtype, copies = self._opened, self._dtype, self._copies
        return [
            (
                opened.tensor(layout.left_key(module.name)).to(dtype, copy=copies),
                opened.tensor(layout.right_key(module.name)).to(dtype, copy=copies),
            )
            for module in piece.modules
        ]
