"""Products of training gradients with preconditioned query gradients: the scores.

    score(q, z) = Σ over modules, positions t of z, of ⟨P_q, g_t a_tᵀ⟩

A training gradient exists for one batch only. There are two observers of a pass over training
sequences: `Scan` sums scores over positions as soon as it can, for all query groups and sequences;
`DetailSums` keeps the scores of single positions and modules, for chosen pairs of a query group and
a sequence.

The scored sequences are the columns of the scores, in data order. Everything is in the basis in
which gradients are multiplied: the parameters' own, or the eigenbasis. Where modules are shared out
among workers, an observer is shown the sequences of all of them in its own modules alone.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.curvature import products
from ekfac_dist.data.batches import CapturedPositions
from ekfac_dist.data.examples import Examples
from ekfac_dist.influence.context import ScoringContext
from ekfac_dist.influence.preconditioned import LowRankGradients, PreparedQueries
from ekfac_dist.models.capture.observers import PairObserver, owned
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.runtime.processes import World


class TrainingPairs(PairObserver[CapturedPositions]):
    """The observer of training sequences that rotates their pairs into the scoring basis.

    Args:
        context: Model, factors, damping, workers.
    """

    def __init__(self, context: ScoringContext) -> None:
        super().__init__(context.modules)
        self._context = context
        self._module_index = {module.name: k for k, module in enumerate(context.modules)}
        self._total = context.zeros(dtype=torch.float64)

    def prepare_input(
        self, module: TrackedModule, acts_Mi: Tensor, positions: CapturedPositions
    ) -> Tensor:
        """The input with its bias coordinate [M, I], in the scoring basis."""
        if self._context.in_eigenbasis:
            return self._context.fitted.rotated_input(module, acts_Mi)
        return products.with_bias(acts_Mi) if module.bias else owned(acts_Mi, positions)

    def on_pair(
        self, module: TrackedModule, acts: Tensor, grads_MO: Tensor, positions: CapturedPositions
    ) -> None:
        """Scores a batch in one module."""
        if self._context.in_eigenbasis:
            grads_MO = self._context.fitted.rotated_gradient(module, grads_MO)
        self.score(module, acts, grads_MO, positions)

    @abstractmethod
    def score(
        self, module: TrackedModule, acts_MI: Tensor, grads_MO: Tensor, batch: CapturedPositions
    ) -> None:
        """Takes a batch in one module; inputs and output-gradients are in the scoring basis."""

    def health(self) -> Tensor:
        """The sum of all scores, which is finite only if every score is."""
        return self._total


class Scan(TrainingPairs):
    """Scores of every training sequence for every query group of a block.

    Args:
        context: Model, factors, damping, workers.
        prepared: The block's preconditioned query gradients.
        sequences: The scored sequences.
        parts: For separate scores of modules or layers: index of the part that each module belongs
            to [modules]. None: no separate scores.
        with_norms: Whether to compute the training gradients' norms; in the eigenbasis only.
        with_positions: Whether to keep the scores of single positions.

    Attributes:
        dtype: Of the inputs and output-gradients that are shown.
        scores: Scores [Q, N].
        part_scores: Scores of each part [Q, parts, N], or None.
        norms: Σ over modules of ⟨G, (F + λ)⁻¹ G⟩ and of ‖(F + λ)⁻¹ G‖² [2, N], or None.
        position_scores: Scores of each position [Q, positions], sequence after sequence; or None.
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
        self.dtype = context.dtype
        self._columns = Columns(sequences)
        self._parts = parts
        self._tiles, self._scratch = products.GradientTiles(), products.ScratchBuffer()
        num_groups, num_columns = len(prepared.groups), len(sequences)
        self.scores: Tensor = context.zeros(num_groups, num_columns)
        self.part_scores: Tensor | None = None
        self.norms: Tensor | None = None
        self.position_scores: Tensor | None = None
        if parts is not None:
            num_parts = int(parts.max()) + 1
            self.part_scores = context.zeros(num_groups, num_parts, num_columns)
        if with_norms:
            self.norms = context.zeros(2, num_columns)
        if with_positions:
            self.position_scores = context.zeros(num_groups, self._columns.num_positions)

    def is_by_position(self, lengths: Sequence[int]) -> bool:
        """Whether sequences are scored by position alone, from query gradients of low rank.

        Args:
            lengths: Positions of each sequence.
        """
        return self.norms is None and all(
            isinstance(one, LowRankGradients) and one.by_position(lengths, are_formed=False)
            for one in self._prepared.gradients.values()
        )

    def take_in(self, dtype: torch.dtype) -> None:
        """Sets the dtype of sequences that are shown; they must be scored by position alone."""
        self.dtype = dtype
        gradients = {
            name: type(one)(*(tensor.to(dtype) for tensor in one.tensors()))
            for name, one in self._prepared.gradients.items()
        }
        self._prepared = replace(self._prepared, gradients=gradients)

    def score(
        self, module: TrackedModule, acts_MI: Tensor, grads_MO: Tensor, batch: CapturedPositions
    ) -> None:
        """Scores a batch in one module."""
        gradients = self._prepared.gradients[module.name]
        columns = self._columns.place_of(batch, acts_MI.device)
        scores_Qn = None
        are_formed = self.norms is not None
        if self.position_scores is not None or gradients.by_position(batch.lengths, are_formed):
            scores_QM = gradients.all_position_scores(acts_MI, grads_MO)
            scores_Qn = products.sum_by_sequence(scores_QM, batch.lengths)
            if self.position_scores is not None:
                self.position_scores[:, self._columns.positions_of(batch)] += scores_QM
        if scores_Qn is None or self.norms is not None:
            by_sequence_Qn = self._by_sequence(
                module, acts_MI, grads_MO, batch, columns, with_scores=scores_Qn is None
            )
            scores_Qn = by_sequence_Qn if scores_Qn is None else scores_Qn
        self.scores[:, columns] += scores_Qn
        if self.part_scores is not None and self._parts is not None:
            part = int(self._parts[self._module_index[module.name]])
            self.part_scores[:, part, columns] += scores_Qn
        self._total += scores_Qn.sum(dtype=torch.float64)

    def _by_sequence(
        self,
        module: TrackedModule,
        acts_MI: Tensor,
        grads_MO: Tensor,
        batch: CapturedPositions,
        columns: slice | Tensor,
        *,
        with_scores: bool,
    ) -> Tensor:
        """Scores [Q, n] from the sequences' gradients, from which norms are summed too.

        Args:
            module: The module.
            acts_MI: Inputs.
            grads_MO: Output-gradients.
            batch: Which sequence each position belongs to.
            columns: The sequences' columns.
            with_scores: Whether scores are wanted; else they are zeros.
        """
        gradients = self._prepared.gradients[module.name]
        scores_Qn = self.scores.new_zeros(len(self._prepared.groups), len(batch.lengths))
        norms_2n, damped_OI = None, None
        if self.norms is not None:
            norms_2n = self.norms.new_zeros(2, len(batch.lengths))
            damped_OI = self._context.damped(module)
        for part, rows, tile_noI in self._tiles.of(acts_MI, grads_MO, batch.lengths):
            flat = tile_noI.flatten(1).T
            if with_scores:
                for slots, rows_qoI in gradients.rows_of(rows, self._scratch):
                    scores_Qn[slots, part].addmm_(rows_qoI.flatten(1), flat)
            if norms_2n is not None and damped_OI is not None:
                inverse = 1 / damped_OI[rows].flatten()
                norms_2n[:, part].addmm_(torch.stack([inverse, inverse.square()]), flat.square_())
        if norms_2n is not None and self.norms is not None:
            self.norms[:, columns] += norms_2n
            self._total += norms_2n.sum(dtype=torch.float64)
        return scores_Qn

    def reduce(self, world: World) -> None:
        """Sums scores and norms over all workers: of other sequences, or in other modules."""
        results = (self.scores, self.part_scores, self.norms, self.position_scores)
        self._context.world.all_reduce_([tensor for tensor in results if tensor is not None])


@dataclass(frozen=True)
class Pairs:
    """Pairs of a query group of a block and a scored sequence, sorted by sequence.

    Attributes:
        slots: The group's index in the block, for each pair [P].
        columns: The sequence's column, for each pair [P], ascending.
        offsets: Start of each pair's positions among those of all pairs, and their number [P + 1].
    """

    slots: np.ndarray
    columns: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, int]], sequences: Examples) -> "Pairs":
        """From (slot, column) of each pair; repeated pairs count once."""
        ordered = sorted({(column, slot) for slot, column in pairs})
        columns = np.array([column for column, _ in ordered], dtype=np.int64)
        slots = np.array([slot for _, slot in ordered], dtype=np.int64)
        lengths = sequences.num_positions[columns]
        return cls(slots, columns, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


class DetailSums(TrainingPairs):
    """Scores of modules, layers and positions for chosen pairs.

    Args:
        context: Model, factors, damping, workers.
        prepared: The preconditioned query gradients of the pairs' block.
        sequences: The scored sequences.
        pairs: The pairs.
        layer_of: Index of each module's layer [modules].

    Attributes:
        module_scores: Scores of each pair in each module [P, modules].
        layer_position_scores: Scores of each position in each layer [layers, positions], pair after
            pair.
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
        self.module_scores = context.zeros(len(pairs.slots), len(context.modules))
        self.layer_position_scores = context.zeros(int(layer_of.max()) + 1, int(pairs.offsets[-1]))

    def score(
        self, module: TrackedModule, acts_MI: Tensor, grads_MO: Tensor, batch: CapturedPositions
    ) -> None:
        """Scores the pairs of a batch in one module."""
        gradients = self._prepared.gradients[module.name]
        module_index = self._module_index[module.name]
        layer = self.layer_position_scores[self._layer_of[module_index]]
        # All sequences of a query group at once, so that its large gradient is read only once.
        pairs_by_slot: dict[int, list[tuple[int, slice]]] = {}
        offsets = torch.from_numpy(offsets_of(batch)).to(layer.device)
        start = 0
        for column, length in zip(self._columns.of(batch).tolist(), batch.lengths, strict=True):
            first, last = np.searchsorted(self._pairs.columns, [column, column + 1])
            for pair in range(int(first), int(last)):
                slot = int(self._pairs.slots[pair])
                pairs_by_slot.setdefault(slot, []).append((pair, slice(start, start + length)))
            start += length
        for slot, pairs in pairs_by_slot.items():
            positions = torch.cat([torch.arange(part.start, part.stop) for _, part in pairs])
            positions = positions.to(acts_MI.device)
            scores_M = gradients.position_scores(slot, acts_MI[positions], grads_MO[positions])
            lengths = [part.stop - part.start for _, part in pairs]
            for (pair, part), scores_T in zip(pairs, scores_M.split(lengths), strict=True):
                layer[int(self._pairs.offsets[pair]) + offsets[part]] += scores_T
                self.module_scores[pair, module_index] = scores_T.sum()
            self._total += scores_M.sum(dtype=torch.float64)

    def reduce(self, world: World) -> None:
        """Sums scores over all workers: of other sequences, or in other modules."""
        self._context.world.all_reduce_([self.module_scores, self.layer_position_scores])


class Columns:
    """Finds a batch's sequences, and their positions, among all scored ones.

    Args:
        sequences: The scored sequences, in data order.
    """

    def __init__(self, sequences: Examples) -> None:
        self._indices = sequences.indices
        self._offsets = np.concatenate([[0], np.cumsum(sequences.num_positions)])
        self._placed: CapturedPositions | None = None  # the last batch that was placed
        self._place: slice | Tensor = slice(0)

    @property
    def num_positions(self) -> int:
        """Positions of all scored sequences together."""
        return int(self._offsets[-1])

    def of(self, batch: CapturedPositions) -> Tensor:
        """The column of each sequence of a batch [n]."""
        return torch.from_numpy(np.searchsorted(self._indices, batch.indices))

    def place_of(self, batch: CapturedPositions, device: torch.device) -> slice | Tensor:
        """The columns of a batch's sequences: a slice where they follow one another, else [n]."""
        if batch is not self._placed:
            columns = self.of(batch)
            self._placed, self._place = batch, columns.to(device)
            if len(columns) and bool((columns.diff() == 1).all()):
                self._place = slice(int(columns[0]), int(columns[-1]) + 1)
        return self._place

    def positions_of(self, batch: CapturedPositions) -> Tensor:
        """The index of each position of a batch among those of all scored sequences [M]."""
        starts = self._offsets[np.searchsorted(self._indices, batch.indices)]
        return torch.from_numpy(np.repeat(starts, batch.lengths) + offsets_of(batch))


def offsets_of(batch: CapturedPositions) -> np.ndarray:
    """The index, in its sequence, of each position of a batch [M]."""
    if batch.offsets is not None:
        return batch.offsets
    return np.concatenate([np.arange(length) for length in batch.lengths])
