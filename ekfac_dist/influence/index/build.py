"""The pass that builds an index: each sequence's gradient as a few outer products, and its norms.

A worker's sequences come shard by shard; when the last batch of a shard has been through the model,
the shard is whole and is written.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.curvature.products import GradientTiles
from ekfac_dist.curvature.sequence_factors import sequence_factors
from ekfac_dist.curvature.sequence_norms import sequence_norms
from ekfac_dist.data.batch_plan import assign_batches, plan_batches
from ekfac_dist.data.batches import CapturedPositions
from ekfac_dist.data.examples import Examples
from ekfac_dist.influence.context import ScoringContext
from ekfac_dist.influence.index import layout
from ekfac_dist.influence.index.layout import INDICES, NORMS, Shard
from ekfac_dist.influence.index.norms import DAMPINGS, mean_of
from ekfac_dist.influence.preconditioned import rank_in
from ekfac_dist.influence.scan import TrainingPairs
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.runtime.processes import World


def own_shards(shards: Sequence[Shard], sequences: Examples, world: World) -> list[Shard]:
    """The shards that this worker makes: about as many positions as others have."""
    costs = [int(sequences.num_positions[shard.places].sum()) for shard in shards]
    return [shards[k] for k in assign_batches(costs, world.size)[world.rank]]


def batches_of(shard: Shard, sequences: Examples, batch_tokens: int) -> list[list[int]]:
    """A shard's batches, which depend on nothing but its own sequences: lists of places."""
    lengths = sequences.num_positions[shard.places]
    planned = plan_batches(lengths, batch_tokens, sequences.equal_above)
    return [[shard.first + k for k in batch] for batch in planned]


class IndexShards(TrainingPairs):
    """Makes a worker's shards, and hands each to `write` when it is whole.

    Args:
        context: Model, factors, workers.
        sequences: All sequences.
        shards: The worker's shards, in the order of its batches.
        batches: The batches of each of them.
        rank: Rank of what is kept.
        dtype: Dtype of what is kept.
        write: Takes the tensors of a whole shard.
    """

    def __init__(
        self,
        context: ScoringContext,
        sequences: Examples,
        shards: Sequence[Shard],
        batches: Sequence[Sequence[Sequence[int]]],
        rank: int,
        dtype: torch.dtype,
        write: Callable[[Shard, Mapping[str, Tensor]], None],
    ) -> None:
        super().__init__(context)
        self._sequences, self._rank, self._dtype, self._write = sequences, rank, dtype, write
        self._place_of = {int(index): k for k, index in enumerate(sequences.indices)}
        self._ends = self._shard_ends(shards, batches)
        self._shard: Shard | None = shards[0] if shards else None
        self._tensors: dict[str, Tensor] = {}
        self._means: dict[str, float] = {}
        self._tiles = GradientTiles()

    @staticmethod
    def _shard_ends(
        shards: Sequence[Shard], batches: Sequence[Sequence[Sequence[int]]]
    ) -> Iterator[tuple[Shard | None, Shard | None]]:
        """After each batch: the shard that it has made whole, and the one that comes next."""
        following: list[Shard | None] = [*shards[1:], None]
        return chain.from_iterable(
            [*[(None, None)] * (len(own) - 1), (shard, after)]
            for shard, after, own in zip(shards, following, batches, strict=True)
        )

    def score(
        self, module: TrackedModule, acts_MI: Tensor, grads_MO: Tensor, batch: CapturedPositions
    ) -> None:
        """Keeps the gradients of a batch in one module."""
        assert self._shard is not None
        shard, fitted = self._shard, self._context.fitted
        if not self._tensors:
            self._tensors = self._empty(shard)
        if module.name not in self._means:
            self._means[module.name] = mean_of(fitted.lambda_of(module))
        rows = torch.tensor([self._place_of[index] - shard.first for index in batch.indices])
        rank = rank_in(module, self._rank)
        left_ncO, right_ncI = sequence_factors(acts_MI, grads_MO, batch.lengths, rank)
        self._tensors[layout.left_key(module.name)][rows] = left_ncO.to("cpu", self._dtype)
        self._tensors[layout.right_key(module.name)][rows] = right_ncI.to("cpu", self._dtype)
        norms = sequence_norms(
            self._tiles,
            acts_MI,
            grads_MO,
            batch.lengths,
            fitted.lambda_of(module),
            self._means[module.name],
            DAMPINGS,
        )
        self._total += norms.sum(dtype=torch.float64)
        number = self._module_index[module.name]
        self._tensors[NORMS][rows, number] = norms.float().cpu()

    def _empty(self, shard: Shard) -> dict[str, Tensor]:
        """A shard's tensors, zero where no module sees a sequence."""
        expected = layout.shapes(shard, self._context.modules, self._rank, self._dtype)
        tensors = {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in expected.items()}
        tensors[INDICES] = torch.from_numpy(np.array(self._sequences.indices[shard.places]))
        return tensors

    def on_step(self) -> None:
        """Writes the shard that a step has made whole, unless something in it is not finite."""
        whole, following = next(self._ends)
        if whole is None:
            return
        tensors, self._tensors, self._shard = self._tensors or self._empty(whole), {}, following
        if bool(torch.isfinite(self._total)):  # else the pass ends with an error that says where
            self._write(whole, tensors)

    def reduce(self, world: World) -> None:
        """Nothing is summed over workers."""
