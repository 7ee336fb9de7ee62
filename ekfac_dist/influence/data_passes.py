"""The passes over the training data that turn a block's query gradients into scores.

    scan       every scored sequence once, or what an index has    → fields of `InfluenceScores`
    details    the sequences of chosen pairs with a query group    → `Details`
    outputs    either, where positions' scores are of their losses

The observers of `scan` give raw scores; here these are divided by norms, and put into the results.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.config import ScoresConfig
from ekfac_dist.curvature import products
from ekfac_dist.data.examples import Examples
from ekfac_dist.errors import ModelError
from ekfac_dist.influence.context import DATA_LABELS, STORED, ScoringContext
from ekfac_dist.influence.index.scan import IndexScan
from ekfac_dist.influence.output_tokens import OutputTokens
from ekfac_dist.influence.preconditioned import PreparedQueries
from ekfac_dist.influence.saved_blocks import put_rows
from ekfac_dist.influence.scan import DetailSums, Pairs, Scan
from ekfac_dist.influence.scores import Details, InfluenceScores
from ekfac_dist.models.modules import EXPERT
from ekfac_dist.passes.one_pass import SummingObserver, run_pass
from ekfac_dist.passes.state import PassState

# Allowed difference between scores of the scan and of the details, relative to the modules' scores,
# by the model's dtype. Rounding that depends on a batch's shape stays below; with experts, rounding
# may choose another expert.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 0.01}
_TOLERANCE_WITH_EXPERTS = 0.1
_TOLERANCE_IN_16_BITS = 0.3


class DataPasses:
    """Passes over the scored sequences; every method that runs one is a collective.

    Args:
        context: Model, factors, damping, workers.
        scored: The scored sequences.
        config: The scores that are asked for.
        result: The results that scans fill in.
        index: Scores from an index in the place of scans of the data; None: scans of the data.
    """

    def __init__(
        self,
        context: ScoringContext,
        scored: Examples,
        config: ScoresConfig,
        result: InfluenceScores,
        index: IndexScan | None = None,
    ) -> None:
        self._context, self._scored, self._index = context, scored, index
        self._config, self._result = config, result
        self._outputs = OutputTokens(context, scored, result.layer_of)

    def scan(
        self, suffix: str, prepared: PreparedQueries, go_on: Callable[[], bool] | None = None
    ) -> None:
        """Scores every sequence for a block of query groups, and fills in the block's results.

        Args:
            suffix: Ends the passes' names in progress and errors.
            prepared: The block's preconditioned query gradients.
            go_on: As of `IndexScan.run`; for scores from an index.
        """
        config, result, groups = self._config, self._result, prepared.groups
        parts = None
        if config.per_module:
            parts = np.arange(len(result.modules))
        elif config.per_layer:
            parts = result.layer_of
        scan = Scan(
            self._context,
            prepared,
            self._scored,
            parts=parts,
            # Norms do not depend on the queries, so the first block computes them for all.
            with_norms=self._needs_norms and self._index is None and 0 in groups,
            with_positions=config.per_token == "all" and config.tokens == "inputs",
        )
        if self._index is None:
            self._run(f"scan{suffix}", scan, np.arange(len(self._scored)))
        else:
            self._index.run(f"index{suffix}", scan, go_on)
        if scan.norms is not None:
            self._put_norms(scan.norms.cpu())
        elif self._index is not None and self._needs_norms and 0 in groups:
            self._put_norms(self._index.norms().to(self._context.dtype))
        if config.normalize == "cosine":
            query_norms = prepared.self_influence.clamp(min=0).sqrt().cpu()
            result.query_norms[groups] = query_norms.to(self._context.dtype)
        scale = result.scale(groups, slice(None))
        result.scores[groups] = scan.scores.cpu() * scale
        if scan.part_scores is not None:
            self._put_parts(scan.part_scores.cpu() * scale[:, None], groups)
        positions = scan.position_scores
        if config.per_token == "all" and config.tokens == "outputs":
            positions = self._outputs.of_all(f"outputs{suffix}", prepared)
            lengths = self._scored.num_positions.tolist()
            with self._context.world.agree():
                _require_sums_agree(self._context, positions, lengths, scan.scores)
        if positions is not None:
            column_of = np.repeat(np.arange(len(self._scored)), self._scored.num_positions)
            positions = positions.cpu()
            for row, row_scale in zip(positions, scale, strict=True):  # all at once would be large
                row *= row_scale[column_of]
            put_rows(result, "token_scores", positions, groups)

    @property
    def _needs_norms(self) -> bool:
        return self._config.self_influence or self._config.normalize != "none"

    def _put_norms(self, sums_2N: Tensor) -> None:
        """Fills in norms and self-influence of the sequences.

        Args:
            sums_2N: ⟨G, (F + λ)⁻¹ G⟩ and ‖(F + λ)⁻¹ G‖² of each sequence.
        """
        self_influence, squared_norms = sums_2N.clamp(min=0)
        if self._config.self_influence:
            self._result.self_influence = self_influence
        if self._config.normalize in ("cosine", "relatif_l"):
            self._result.norms = self_influence.sqrt()
        elif self._config.normalize == "relatif_theta":
            self._result.norms = squared_norms.sqrt()

    def _put_parts(self, parts: Tensor, groups: list[int]) -> None:
        """Fills in the scores of modules, of layers, or of both.

        Args:
            parts: Scores of the modules, or of the layers if only those are asked for
                [q, parts, N].
            groups: Indices of the block's query groups.
        """
        result = self._result
        if self._config.per_module:
            put_rows(result, "module_scores", parts, groups)
        if self._config.per_layer:
            if self._config.per_module:
                sums = parts.new_zeros(len(groups), len(result.layers), parts.shape[2])
                parts = sums.index_add_(1, torch.from_numpy(result.layer_of), parts)
            put_rows(result, "layer_scores", parts, groups)

    def details(
        self, name: str, prepared: PreparedQueries, pairs: Sequence[tuple[int, int]]
    ) -> Details:
        """Scores of modules, layers and positions for chosen pairs, divided by norms.

        Args:
            name: The pass's name in progress and errors.
            prepared: The preconditioned query gradients of a block.
            pairs: (slot, column) of each pair.
        """
        ordered = Pairs.of(pairs, self._scored)
        sums = DetailSums(self._context, prepared, self._scored, ordered, self._result.layer_of)
        self._run(name, sums, np.unique(ordered.columns))
        groups = np.array(prepared.groups, dtype=np.int64)[ordered.slots]
        scale = self._result.pair_scale(groups, ordered.columns)
        pair_of = np.repeat(np.arange(len(groups)), np.diff(ordered.offsets))
        return Details(
            groups,
            ordered.columns,
            ordered.offsets,
            sums.layer_position_scores.cpu() * scale[pair_of],
            sums.module_scores.cpu() * scale[:, None],
        )

    def with_outputs(self, name: str, prepared: PreparedQueries, details: Details) -> Details:
        """Details whose positions' scores are of their losses, where that is asked for.

        Args:
            name: What the work is called in progress and errors.
            prepared: The preconditioned query gradients of the pairs' block.
            details: Details of pairs, whose modules' scores are kept.

        Raises:
            ModelError: If a layer's scores do not sum to those of its modules.
        """
        if self._config.tokens == "inputs":
            return details
        slot_of = {group: slot for slot, group in enumerate(prepared.groups)}
        slots = np.array([slot_of[group] for group in details.rows.tolist()], dtype=np.int64)
        pairs = Pairs(slots, details.columns, details.offsets)
        scale = self._result.pair_scale(details.rows, details.columns)
        pair_of = np.repeat(np.arange(len(slots)), np.diff(details.offsets))
        scores = self._outputs.by_layer(name, prepared, pairs).cpu() * scale[pair_of]
        layer_of, modules_MP = torch.from_numpy(self._result.layer_of), details.module_scores.T
        layers_LP = scores.new_zeros(len(scores), len(slots)).index_add_(0, layer_of, modules_MP)
        lengths = np.diff(details.offsets).tolist()
        with self._context.world.agree():
            _require_sums_agree(self._context, scores, lengths, layers_LP)
        return replace(details, layer_token_scores=scores)

    def _run(self, name: str, observer: SummingObserver, columns: np.ndarray) -> None:
        """Runs some of the scored sequences through the model, shared out over the workers."""
        context = self._context
        pass_context = context.over(self._scored.take(columns))
        state = PassState(pass_context.own_batches, STORED)
        run_pass(
            name,
            pass_context,
            context.modules,
            observer,
            DATA_LABELS,
            converted=context.converts_rows,
            state=state,
        )


def _tolerance(context: ScoringContext) -> float:
    """Allowed difference between scores of two passes, relative to the modules' scores."""
    tolerance = _TOLERANCE.get(context.model_dtype, _TOLERANCE_IN_16_BITS)
    if any(module.kind == EXPERT for module in context.modules):
        tolerance = max(tolerance, _TOLERANCE_WITH_EXPERTS)
    return tolerance


def require_scan_agrees(context: ScoringContext, result: InfluenceScores, details: Details) -> None:
    """Checks that details sum to the scan's scores, computed with the same query gradients.

    The two were computed in different batches, on which nothing but rounding may depend.

    Args:
        context: Gives the modules and the model's dtype, and by them the tolerance.
        result: The results, with the scan's scores.
        details: The details.

    Raises:
        ModelError: If they differ by more than the tolerance.
    """
    tolerance = _tolerance(context)
    columns = torch.from_numpy(details.columns)
    for group in np.unique(details.rows).tolist():
        pairs = torch.from_numpy(np.flatnonzero(details.rows == group))
        module_scores = details.module_scores[pairs].double()
        scanned = result.scores[group][columns[pairs]].double()
        # Relative to the modules' scores: their sum may be a small difference of large ones.
        difference = (module_scores.sum(1) - scanned).norm() / module_scores.norm()
        if difference > tolerance:
            raise ModelError(
                f"The scores of query {group}'s listed sequences, summed over their positions, "
                f"are not those of the scan (relative difference {difference:.2g}), though "
                "only the batches differ: what this model gives for a sequence depends on its "
                "batch. Set batch_tokens: 1, which gives each sequence a batch of its own."
            )


def _require_sums_agree(
    context: ScoringContext, positions_RM: Tensor, lengths: list[int], expected_Rn: Tensor
) -> None:
    """Checks that the scores of positions' losses sum to those of sequences from another pass.

    Args:
        context: Gives the tolerance.
        positions_RM: Scores of positions, in R layers or for R query groups.
        lengths: Positions of each sequence [n].
        expected_Rn: Scores of the sequences.

    Raises:
        ModelError: If they differ by more than the tolerance.
    """
    positions_RM, expected_Rn = positions_RM.double(), expected_Rn.double()
    difference = (products.sum_by_sequence(positions_RM, lengths) - expected_Rn).norm()
    # A sum may be a small difference of large scores.
    sizes_Rn = products.sum_by_sequence(positions_RM.abs(), lengths)
    difference /= max(sizes_Rn.norm(), expected_Rn.norm())
    if difference > _tolerance(context):
        raise ModelError(
            "The scores of single positions' losses do not sum to the sequences' scores (relative "
            f"difference {difference.item():.2g}): this model's backward is not the derivative of "
            "its forward, or depends on the batch. Set scores.tokens: inputs."
        )
