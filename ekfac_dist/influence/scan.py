"""Training gradients against query gradients: scores of all sequences, and details of some.

A training gradient lives for one batch. Two observers read the same rows: `Scan` sums scores over
positions as soon as it can; `DetailSums` keeps the scores of positions and modules for chosen pairs
of a row of queries and a sequence.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.curvature import products
from ekfac_dist.curvature.blocks import on, rotate_rows
from ekfac_dist.data.batches import CapturedPositions
from ekfac_dist.data.examples import Examples
from ekfac_dist.influence.context import ScoringContext
from ekfac_dist.influence.preconditioned import PreparedQueries
from ekfac_dist.models.capture.observers import PairObserver, owned
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.runtime.processes import World


class _TrainingPairs(PairObserver[CapturedPositions]):
    """Pairs of training sequences, in the basis in which gradients are compared."""

    def __init__(self, context: ScoringContext) -> None:
        super().__init__(context.modules)
        self._context = context
        self._number = {module.name: k for k, module in enumerate(context.modules)}
        self._total = context.zeros(dtype=torch.float64)

    def prepare_input(
        self, module: TrackedModule, acts_Mi: Tensor, positions: CapturedPositions
    ) -> Tensor:
        """The input with its bias coordinate [M, I], in the basis of comparison."""
        if self._context.in_eigenbasis:
            fitted = self._context.factors.module(module.name)
            return rotate_rows(acts_Mi, on(fitted.blocks_II, acts_Mi), bias=module.bias)
        return products.with_bias(acts_Mi) if module.bias else owned(acts_Mi, positions)

    def on_pair(
        self, module: TrackedModule, acts: Tensor, grads_MO: Tensor, positions: CapturedPositions
    ) -> None:
        """Scores a batch's positions in one module."""
        if self._context.in_eigenbasis:
            fitted = self._context.factors.module(module.name)
            grads_MO = rotate_rows(grads_MO, on(fitted.blocks_OO, grads_MO))
        self._score(module, acts, grads_MO, positions)

    @abstractmethod
    def _score(
        self, module: TrackedModule, acts_MI: Tensor, grads_MO: Tensor, batch: CapturedPositions
    ) -> None:
        """Scores them, both sides of each pair in the basis of comparison."""

    def health(self) -> Tensor:
        """Σ of all scores, which is finite only if every score is."""
        return self._total


class Scan(_TrainingPairs):
    """Scores of every training sequence for every row of a block.

    Args:
        context: What gradients are computed with.
        prepared: The block.
        sequences: The training sequences that are scored.
        parts: Which part of the scores each module belongs to [modules]; None: none are kept.
        with_norms: Whether to sum the sequences' own norms; in the eigenbasis only.
        with_positions: Whether to keep the scores of every position.

    Attributes:
        scores: [Q, N].
        part_scores: [Q, parts, N], or None.
        norms: Σ over modules of ⟨G, (F + λ)⁻¹ G⟩ and of ‖(F + λ)⁻¹ G‖² [2, N], or None.
        position_scores: [Q, positions], or None; sequence after sequence.
    """

    def __init__(
        self,
        context: ScoringContext,
        prepared: PreparedQueries,
        sequences: Examples,
        *,
        parts: np.ndarray | None,
        with_norms: bool,
        with_positions: bool,
    ) -> None:
        super().__init__(context)
        self._prepared = prepared
        self._columns = Columns(sequences)
        self._parts = parts
        self._sums, self._scratch = products.SequenceGradients(), products.ScratchBuffer()
        num_rows, num_columns = len(prepared.rows), len(sequences)
        self.scores: Tensor = context.zeros(num_rows, num_columns)
        self.part_scores: Tensor | None = None
        self.norms: Tensor | None = None
        self.position_scores: Tensor | None = None
        if parts is not None:
            number = int(parts.max()) + 1
            self.part_scores = context.zeros(num_rows, number, num_columns)
        if with_norms:
            self.norms = context.zeros(2, num_columns)
        if with_positions:
            self.position_scores = context.zeros(num_rows, self._columns.num_positions)

    def _score(
        self, module: TrackedModule, acts_MI: Tensor, grads_MO: Tensor, batch: CapturedPositions
    ) -> None:
        gradients = self._prepared.gradients[module.name]
        columns = self._columns.of(batch).to(acts_MI.device)
        scores_Qn = None
        if self.position_scores is not None or gradients.by_position(batch.lengths):
            scores_QM = gradients.all_position_scores(acts_MI, grads_MO)
            scores_Qn = products.sum_by_sequence(scores_QM, batch.lengths)
            if self.position_scores is not None:
                self.position_scores[:, self._columns.positions_of(batch)] += scores_QM
        if scores_Qn is None or self.norms is not None:
            found_Qn = self._by_sequence(
                module, acts_MI, grads_MO, batch, columns, with_scores=scores_Qn is None
            )
            scores_Qn = found_Qn if scores_Qn is None else scores_Qn
        self.scores[:, columns] += scores_Qn
        if self.part_scores is not None and self._parts is not None:
            part = int(self._parts[self._number[module.name]])
            self.part_scores[:, part, columns] += scores_Qn
        self._total += scores_Qn.sum(dtype=torch.float64)

    def _by_sequence(
        self,
        module: TrackedModule,
        acts_MI: Tensor,
        grads_MO: Tensor,
        batch: CapturedPositions,
        columns: Tensor,
        *,
        with_scores: bool,
    ) -> Tensor:
        """Scores [Q, n], and norms if wanted, from each sequence's whole gradient."""
        gradients = self._prepared.gradients[module.name]
        scores_Qn = self.scores.new_zeros(len(self._prepared.rows), len(batch.lengths))
        weights = None
        if self.norms is not None:
            inverse = 1 / self._context.damped(module.name, self._context.at_device(module.name))
            weights = torch.stack([inverse, inverse.square()]).flatten(1)
        for which, sums_nOI in self._sums.of(acts_MI, grads_MO, batch.lengths):
            flat = sums_nOI.flatten(1)
            if with_scores:
                for some, matrices_qOI in gradients.matrices(self._scratch):
                    scores_Qn[some, which] = matrices_qOI.flatten(1) @ flat.T
            if weights is not None and self.norms is not None:
                norms = weights @ flat.square_().T
                self.norms[:, columns[which]] += norms
                self._total += norms.sum(dtype=torch.float64)
        return scores_Qn

    def reduce(self, world: World) -> None:
        """Puts the scores of all workers' sequences together."""
        results = (self.scores, self.part_scores, self.norms, self.position_scores)
        world.all_reduce_([tensor for tensor in results if tensor is not None])


@dataclass(frozen=True)
class Pairs:
    """Rows of a block paired with training sequences, sequence by sequence.

    Attributes:
        places: The row's place in the block, of each pair [P].
        columns: The sequence's column of each pair [P], ascending.
        offsets: Where each pair's positions begin [P + 1].
    """

    places: np.ndarray
    columns: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, wanted: Sequence[tuple[int, int]], sequences: Examples) -> "Pairs":
        """From (place in the block, column), no pair twice."""
        ordered = sorted({(column, place) for place, column in wanted})
        columns = np.array([column for column, _ in ordered], dtype=np.int64)
        places = np.array([place for _, place in ordered], dtype=np.int64)
        lengths = sequences.num_positions[columns]
        return cls(places, columns, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


class DetailSums(_TrainingPairs):
    """Scores of modules, layers and positions for chosen pairs.

    Args:
        context: What gradients are computed with.
        prepared: The block that the pairs' rows are of.
        sequences: The training sequences that columns count.
        pairs: The pairs.
        layer_of: Number of each module's layer [modules].

    Attributes:
        module_scores: [P, modules].
        layer_position_scores: [layers, positions].
    """

    def __init__(
        self,
        context: ScoringContext,
        prepared: PreparedQueries,
        sequences: Examples,
        pairs: Pairs,
        layer_of: np.ndarray,
    ) -> None:
        super().__init__(context)
        self._prepared = prepared
        self._pairs = pairs
        self._columns = Columns(sequences)
        self._layer_of = layer_of
        self.module_scores = context.zeros(len(pairs.places), len(context.modules))
        self.layer_position_scores = context.zeros(int(layer_of.max()) + 1, int(pairs.offsets[-1]))

    def _score(
        self, module: TrackedModule, acts_MI: Tensor, grads_MO: Tensor, batch: CapturedPositions
    ) -> None:
        gradients = self._prepared.gradients[module.name]
        number = self._number[module.name]
        layer = self.layer_position_scores[self._layer_of[number]]
        # All of a row's sequences at once: its gradient is large, and read once for all of them.
        wanted: dict[int, list[tuple[int, slice]]] = {}
        offsets = torch.from_numpy(offsets_of(batch)).to(layer.device)
        start = 0
        for column, length in zip(self._columns.of(batch).tolist(), batch.lengths, strict=True):
            first, last = np.searchsorted(self._pairs.columns, [column, column + 1])
            for pair in range(int(first), int(last)):
                place = int(self._pairs.places[pair])
                wanted.setdefault(place, []).append((pair, slice(start, start + length)))
            start += length
        for place, pairs in wanted.items():
            rows = torch.cat([torch.arange(part.start, part.stop) for _, part in pairs])
            rows = rows.to(acts_MI.device)
            scores_M = gradients.position_scores(place, acts_MI[rows], grads_MO[rows])
            lengths = [part.stop - part.start for _, part in pairs]
            for (pair, part), scores_T in zip(pairs, scores_M.split(lengths), strict=True):
                layer[int(self._pairs.offsets[pair]) + offsets[part]] += scores_T
                self.module_scores[pair, number] = scores_T.sum()
            self._total += scores_M.sum(dtype=torch.float64)

    def reduce(self, world: World) -> None:
        """Puts the pairs of all workers' sequences together."""
        world.all_reduce_([self.module_scores, self.layer_position_scores])


class Columns:
    """Where a batch's sequences, and their positions, stand among the scored ones.

    Args:
        sequences: The scored sequences, in data order.
    """

    def __init__(self, sequences: Examples) -> None:
        self._indices = sequences.indices
        self._offsets = np.concatenate([[0], np.cumsum(sequences.num_positions)])

    @property
    def num_positions(self) -> int:
        """Positions of all sequences."""
        return int(self._offsets[-1])

    def of(self, batch: CapturedPositions) -> Tensor:
        """Column of each sequence of a batch [n]."""
        return torch.from_numpy(np.searchsorted(self._indices, batch.indices))

    def positions_of(self, batch: CapturedPositions) -> Tensor:
        """Place, among all positions, of each position of a batch [M]."""
        starts = self._offsets[np.searchsorted(self._indices, batch.indices)]
        return torch.from_numpy(np.repeat(starts, batch.lengths) + offsets_of(batch))


def offsets_of(batch: CapturedPositions) -> np.ndarray:
    """Place of each of a batch's rows in its sequence [M]."""
    if batch.offsets is not None:
        return batch.offsets
    return np.concatenate([np.arange(length) for length in batch.lengths])
