"""What the loss of each position of a training sequence does (Grosse et al. 2023, eq. 36).

    score(q, z, t) = ⟨P_q, ∇ℓ_t(z)⟩,  ℓ_t = −log p(label of position t)

It is the derivative of ℓ_t where the weights move along P_q = (F + λ)⁻¹∇_q. So one derivative of a
sequence's forward along P_q has the scores of all of its positions, which sum to the sequence's;
those without a label have 0. A layer's part of them is the derivative along P_q in this layer's
modules alone, which is as much work as that of all layers, less what lies below the layer.

Every worker holds P_q of its own modules. Where these are shared out, all workers of a copy run the
copy's sequences, each for its own modules, so that no P_q travels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.curvature.kronecker import rotate_back
from ekfac_dist.data.batch_plan import assign_batches, padded_sizes, plan_batches
from ekfac_dist.data.batches import Batch
from ekfac_dist.data.examples import Examples
from ekfac_dist.errors import ConfigError, ModelError, NonFiniteError, UserError
from ekfac_dist.influence.context import OVERFLOW_ADVICE, STORED, ScoringContext
from ekfac_dist.influence.preconditioned import PreparedQueries
from ekfac_dist.influence.scan import Pairs
from ekfac_dist.models.capture.linearised import Linearisation, LinearisedBatch
from ekfac_dist.models.capture.tasks import LossTask, SequenceClassification
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.models.sharding import agreeing, is_sharded
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.prefetch import prefetch
from ekfac_dist.runtime.progress import Progress

_INSTEAD = "set scores.tokens: inputs"
_ADVICE = f"scores.tokens: outputs needs; {_INSTEAD}"
# A forward's graph, that of its backward, and what is held between take about so many times the
# memory of a step that runs both once.
_STEPS = 4


class Direction(Mapping[str, Tensor]):
    """P of one query group in some modules [O, I], each computed when it is asked for.

    Args:
        context: The basis that gradients are held in.
        prepared: The query gradients.
        slot: The group's index in its block.
        modules: The modules.
    """

    def __init__(
        self,
        context: ScoringContext,
        prepared: PreparedQueries,
        slot: int,
        modules: Sequence[TrackedModule],
    ) -> None:
        self._context, self._prepared, self._slot = context, prepared, slot
        self._modules = {module.name: module for module in modules}

    def __getitem__(self, name: str) -> Tensor:
        matrix_OI = self._prepared.gradients[name].matrix(self._slot)
        if not self._context.in_eigenbasis:
            return matrix_OI
        module, fitted = self._modules[name], self._context.fitted
        return rotate_back(matrix_OI, fitted.output_basis(module), fitted.input_basis(module))

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


@dataclass(frozen=True)
class _Work:
    """A batch whose positions are scored for some query groups.

    Attributes:
        columns: The sequences' columns.
        slots: The groups' indices in their block.
        pairs: The pairs of the only group with these sequences; empty where all are scored for all.
    """

    columns: list[int]
    slots: tuple[int, ...]
    pairs: tuple[int, ...] = ()


def require_output_tokens(context: ScoringContext, scored: Examples) -> None:
    """Checks on the shortest sequence that positions have losses of their own; a collective.

    Args:
        context: Model, task, modules, workers.
        scored: The scored sequences.

    Raises:
        ConfigError: If the task's loss is not a sum over positions.
        ModelError: If the model is sharded, or its backward cannot be differentiated.
    """
    task, model = context.task, context.model
    with agreeing(context.world, model, UserError):
        if isinstance(task, (LossTask, SequenceClassification)):
            raise ConfigError(
                f"scores.tokens is outputs, but the loss of the task {task.name} is a sequence's, "
                f"and no sum over positions; {_INSTEAD}."
            )
        if is_sharded(model):
            raise ModelError(
                "scores.tokens is outputs, but the model is sharded over the workers, whose "
                "gathered weights a second derivative would need again; give every worker the "
                f"whole model, or {_INSTEAD}."
            )
        zero = context.zeros(1, 1)
        nowhere = {m.name: zero.expand(m.num_outputs, m.input_size) for m in context.modules}
        batch = context.over(scored).shortest_batch()
        with _linearisation(context, context.modules) as linearisation:
            linearised = linearisation.of(batch)
            linearised.log_probability_tangents(nowhere)
            _positions(linearised, batch)


def _linearisation(context: ScoringContext, modules: Sequence[TrackedModule]) -> Linearisation:
    return Linearisation(context.model, modules, context.dtype, context.task, _ADVICE)


class OutputTokens:
    """Scores the losses of the scored sequences' positions; methods are collectives.

    Args:
        context: Model, factors, workers.
        scored: The scored sequences.
        layer_of: Index of each module's layer [modules].
    """

    def __init__(self, context: ScoringContext, scored: Examples, layer_of: np.ndarray) -> None:
        self._context, self._scored = context, scored
        self._num_layers = int(layer_of.max()) + 1
        layers = dict(zip((m.name for m in context.modules), layer_of.tolist(), strict=True))
        self._layer_of = {module.name: layers[module.name] for module in context.own_modules}

    def by_layer(self, name: str, prepared: PreparedQueries, pairs: Pairs) -> Tensor:
        """Scores of each position in each layer for chosen pairs [layers, positions].

        Args:
            name: What the work is called in progress and errors.
            prepared: The preconditioned query gradients of the pairs' block.
            pairs: The pairs; positions are pair after pair.
        """
        scores = self._context.zeros(self._num_layers, int(pairs.offsets[-1]))
        layers = sorted(set(self._layer_of.values()))
        modules = {
            layer: [m for m in self._context.own_modules if self._layer_of[m.name] == layer]
            for layer in layers
        }

        def score(work: _Work, batch: Batch, linearised: LinearisedBatch) -> None:
            (slot,) = work.slots
            directions = [
                Direction(self._context, prepared, slot, modules[layer]) for layer in layers
            ]
            starts = pairs.offsets[list(work.pairs)]
            tangents_lL = linearised.log_probability_tangents_of(directions)
            self._put(scores, layers, tangents_lL, starts, batch, linearised)

        self._run(name, self._work_of_pairs(pairs), score)
        self._context.world.all_reduce_([scores])
        return scores

    def of_all(self, name: str, prepared: PreparedQueries) -> Tensor:
        """Scores of each position of every sequence for all query groups [Q, positions].

        Args:
            name: What the work is called in progress and errors.
            prepared: The preconditioned query gradients of a block.
        """
        slots = tuple(range(len(prepared.groups)))
        starts = np.concatenate([[0], np.cumsum(self._scored.num_positions)])
        scores = self._context.zeros(len(slots), int(starts[-1]))
        modules = self._context.own_modules

        def score(work: _Work, batch: Batch, linearised: LinearisedBatch) -> None:
            directions = [Direction(self._context, prepared, slot, modules) for slot in slots]
            tangents_qL = linearised.log_probability_tangents_of(directions)
            self._put(scores, slots, tangents_qL, starts[work.columns], batch, linearised)

        batches = self._batches(np.arange(len(self._scored)))
        self._run(name, [_Work(columns, slots) for columns in batches], score)
        self._context.world.all_reduce_([scores])
        return scores

    def _batches(self, columns: np.ndarray) -> list[list[int]]:
        """Batches of some columns, each of which fits with its graphs."""
        context, lengths = self._context, self._scored.num_positions[columns]
        budget = 1 if context.checkpoints else max(1, context.batch_tokens // _STEPS)
        batches = plan_batches(lengths, budget, self._scored.equal_above)
        return [columns[batch].tolist() for batch in batches]

    def _work_of_pairs(self, pairs: Pairs) -> list[_Work]:
        work = []
        for slot in np.unique(pairs.slots).tolist():
            of_slot = np.flatnonzero(pairs.slots == slot)
            pair_of = dict(zip(pairs.columns[of_slot].tolist(), of_slot.tolist(), strict=True))
            for columns in self._batches(pairs.columns[of_slot]):
                work.append(_Work(columns, (slot,), tuple(pair_of[c] for c in columns)))
        return work

    def _run(
        self,
        name: str,
        work: Sequence[_Work],
        score: Callable[[_Work, Batch, LinearisedBatch], None],
    ) -> None:
        """Linearises batches, shared out over the copies of the factors."""
        context, world, lengths = self._context, self._context.world, self._scored.num_positions
        columns = [one.columns for one in work]
        copies = world.size // context.shard
        own = assign_batches(padded_sizes(lengths, columns), copies)[world.rank // context.shard]
        own = own if context.own_modules else []
        progress = Progress(
            name,
            total=sum(int(lengths[columns[k]].sum()) for k in own),
            unit="tokens",
            num_sequences=sum(len(columns[k]) for k in own),
            whole=(sum(int(lengths[batch].sum()) for batch in columns), sum(map(len, columns))),
            enabled=context.show_progress and world.is_main,
        )
        with (
            world.agree(),
            _linearisation(context, context.own_modules) as linearisation,
            progress,
        ):
            batches = prefetch(self._scored.batch, [columns[k] for k in own])
            for k, collated in zip(own, batches, strict=True):
                batch = collated.to(world.device)
                score(work[k], batch, linearisation.of(batch))
                progress.update(batch.num_positions, len(columns[k]))
                world.check_peers()
                if preemption.requested():
                    raise preemption.ended(STORED)

    def _put(
        self,
        scores: Tensor,
        rows: Sequence[int],
        tangents_rL: Tensor,
        starts: np.ndarray,
        batch: Batch,
        linearised: LinearisedBatch,
    ) -> None:
        """Puts a batch's scores among all.

        Args:
            scores: All scores, changed in place.
            rows: Their rows that these scores belong to [r].
            tangents_rL: The derivatives of log p of the batch's labels.
            starts: Where each sequence's positions begin in a row [B].
            batch: The batch.
            linearised: The same, linearised.
        """
        sequences, offsets = _positions(linearised, batch)
        if not torch.isfinite(tangents_rL).all():
            bad = int((~torch.isfinite(tangents_rL)).any(0).nonzero()[0])
            raise NonFiniteError(
                "NaN or infinity in the derivative of log p at sequence "
                f"{batch.indices[sequences[bad]]} of the data, position {offsets[bad]}. "
                f"{OVERFLOW_ADVICE}."
            )
        places = torch.from_numpy(starts[sequences] + offsets).to(scores.device)
        # The query's gradient is of −log p too: the score is the derivative of −log p.
        for row, tangents_L in zip(rows, tangents_rL, strict=True):
            scores[row, places] = -tangents_L.to(scores)


def _positions(linearised: LinearisedBatch, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """(number of the sequence in the batch, offset among its positions) of each label [L].

    Raises:
        ModelError: If labels are not where counted positions are.
    """
    grid = batch.grid("")
    counted = linearised.labels.flat
    if grid.real_on_host is not None:
        counted = np.searchsorted(grid.real_on_host, linearised.labels.flat)
        inside = counted < len(grid.real_on_host)
        inside[inside] = grid.real_on_host[counted[inside]] == linearised.labels.flat[inside]
    else:
        inside = np.ones(len(counted), dtype=bool)
    if linearised.shape != grid.shape or not inside.all():
        raise ModelError(
            "scores.tokens is outputs, but the task's labels are of shape "
            f"{list(linearised.shape)}, for positions of shape {list(grid.shape)}, or are at "
            f"positions that are not counted; which position a loss belongs to is not known: "
            f"{_INSTEAD}."
        )
    starts = np.concatenate([[0], np.cumsum(grid.lengths)])
    sequences = np.searchsorted(starts, counted, side="right") - 1
    offsets = counted - starts[sequences] if grid.offsets is None else grid.offsets[counted]
    return sequences, offsets
