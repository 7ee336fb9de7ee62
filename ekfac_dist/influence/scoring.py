"""Scores training sequences for queries, block by block: the order of the work.

    for each block of query groups that fits the memory budget
        query gradients      whole, or of low rank
        scan                 every training sequence, once; or what an index keeps of them
        re-scoring           if asked for: exact scores, from whole gradients, of the sequences that
                             the scan ranks first and last
        details              scores of positions, layers and modules of the listed sequences

The scan of a block, and what follows it, are pieces of the work (see `blocks`): `SavedBlocks` saves
each when it is finished, and a piece that is saved already is loaded instead of computed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.config import Checkpointing, ScoresConfig
from ekfac_dist.data.examples import Examples, TaskExamples
from ekfac_dist.influence.blocks import (
    Block,
    bytes_on_disk,
    plan_blocks,
)
from ekfac_dist.influence.context import ScoringContext
from ekfac_dist.influence.data_passes import DataPasses, require_scan_agrees
from ekfac_dist.influence.held import computes_again, factors_on_device
from ekfac_dist.influence.index.reader import GradientIndex
from ekfac_dist.influence.index.scan import IndexScan
from ekfac_dist.influence.lists import (
    Chosen,
    Lists,
    choose_for_rescoring,
    exact_lists,
    list_lengths,
    listed_pairs,
    make_lists,
)
from ekfac_dist.influence.output_tokens import require_output_tokens
from ekfac_dist.influence.plan_lines import plan_lines, resumed_line
from ekfac_dist.influence.preconditioned import PreparedQueries, rank_in
from ekfac_dist.influence.queries import QuerySet
from ekfac_dist.influence.query_gradients import prepare
from ekfac_dist.influence.refinement import Refinement
from ekfac_dist.influence.refinement_start import start_refinement
from ekfac_dist.influence.refinement_trial import tried
from ekfac_dist.influence.saved_blocks import (
    SavedBlocks,
    details_of,
    details_tensors,
    losses_tensors,
    put_losses,
    put_scan,
    scan_tensors,
)
from ekfac_dist.influence.scores import Details, InfluenceScores, Rescored
from ekfac_dist.models.modules import layer_name
from ekfac_dist.passes.sequences import (
    exactly_batched,
    require_harmless_padding,
    with_chunked_head,
)
from ekfac_dist.runtime.logs import log_on_main


def compute_scores(
    context: ScoringContext,
    queries: QuerySet,
    scored: Examples,
    config: ScoresConfig,
    saved: SavedBlocks | None = None,
    checkpointing: Checkpointing = "auto",
    train: Examples | None = None,
    index: GradientIndex | None = None,
) -> InfluenceScores:
    """Scores training sequences for queries; a collective.

    Args:
        context: Model (prepared), factors, damping, workers.
        queries: The queries.
        scored: The training sequences that are scored.
        config: The scores that are asked for.
        saved: Where finished pieces are saved; None: nowhere.
        checkpointing: Whether layers are computed again in the backward, or "auto".
        train: The whole training set, of which query gradients are refined; None: it is `scored`.
        index: Scans what it keeps of the training gradients in the place of the data; None: scans
            the data.

    Raises:
        UserError: If the user can correct the cause; on every worker alike.
    """
    top_k, bottom_k = list_lengths(config, len(scored))
    if isinstance(scored, TaskExamples):
        require_harmless_padding(
            context.model, scored, context.task, context.world, context.batch_tokens
        )
    task = with_chunked_head(context.model, context.modules, scored, context.task, context.world)
    context = replace(context, task=task)
    scored = exactly_batched(
        context.model, scored, context.task, context.world, context.batch_tokens
    )
    num_groups = len(queries.members)
    checkpoints = computes_again(context, scored, num_groups, config, checkpointing)
    context = replace(context, checkpoints=checkpoints)
    # In the eigenbasis norms cost little, and query gradients need not be rotated back.
    needs_norms = config.self_influence or config.normalize != "none"
    context = replace(context, in_eigenbasis=needs_norms or index is not None)
    row_order = context.over(scored).noted_row_order(context.modules)
    fitted = factors_on_device(context, scored, num_groups, config)
    context = replace(context, row_order=row_order, on_device=fitted)
    if config.tokens == "outputs":
        require_output_tokens(context, scored)
    index_rank = None if index is None else index.rank
    result, refinement = empty_result(context, queries, scored, config, index_rank), None
    if context.refine.is_on:
        refinement = start_refinement(context, train or scored, config, num_groups)
        result.refined = refinement.result
    run = _Scoring(
        context,
        queries,
        scored,
        config,
        (top_k, bottom_k),
        result,
        saved or SavedBlocks(),
        refinement,
        _index_scan(context, index, scored, with_norms=needs_norms),
    )
    run.all_blocks()
    return result


def _index_scan(
    context: ScoringContext, index: GradientIndex | None, scored: Examples, *, with_norms: bool
) -> IndexScan | None:
    """Scores from an index, if there is one; a collective."""
    if index is None:
        return None
    with context.world.agree():
        return IndexScan(context, index, scored, with_norms=with_norms)


def empty_result(
    context: ScoringContext,
    queries: QuerySet,
    scored: Examples,
    config: ScoresConfig,
    index_rank: int | None,
) -> InfluenceScores:
    """The results before anything is computed: zero scores, norms of one."""
    names = tuple(module.name for module in context.modules)
    layers = tuple(dict.fromkeys(map(layer_name, names)))
    num_groups = len(queries.members)
    return InfluenceScores(
        scores=torch.zeros(num_groups, len(scored), dtype=context.dtype),
        indices=scored.indices,
        members=queries.members,
        training_size=config.training_size,
        index_rank=index_rank,
        normalize=config.normalize,
        tokens=config.tokens,
        norms=torch.ones(len(scored), dtype=context.dtype),
        query_norms=torch.ones(num_groups, dtype=context.dtype),
        modules=names,
        layers=layers,
        layer_of=np.array([layers.index(layer_name(name)) for name in names]),
        damping=dict(context.damping),
        query_losses=[math.nan] * len(queries),
        against_losses=[None] * len(queries),
    )


@dataclass
class _Scoring:
    """The scoring of all query groups; arguments as of `compute_scores`.

    Attributes:
        list_lengths: Lengths of the lists of the (most positive, most negative) sequences.
        result: The results, filled in block by block.
        lists: The lists of each finished query group, by its index.
        rescored: The sequences scored again for each finished query group, by its index.
        details: The details of each finished piece.
    """

    context: ScoringContext
    queries: QuerySet
    scored: Examples
    config: ScoresConfig
    list_lengths: tuple[int, int]
    result: InfluenceScores
    saved: SavedBlocks
    refinement: Refinement | None = None
    index: IndexScan | None = None
    lists: dict[int, Lists] = field(default_factory=dict)
    rescored: dict[int, Rescored] = field(default_factory=dict)
    details: list[Details] = field(default_factory=list)

    def _log(self, line: str) -> None:
        log_on_main(self.context.world, line)

    def __post_init__(self) -> None:
        self._passes = DataPasses(self.context, self.scored, self.config, self.result, self.index)

    def all_blocks(self) -> None:
        """Computes every block, and puts lists and details into the results."""
        rows = range(len(self.queries.members))
        context, result = self.context, self.result
        blocks = plan_blocks(len(rows), context, self.config, self.saved.finished)
        result.num_scans = len(blocks)
        for line in plan_lines(context, self.config, len(self.queries), len(rows), len(blocks)):
            self._log(line)
        self.saved.require_disk_space(
            *bytes_on_disk(result, self.scored, self.config, self.list_lengths)
        )
        if (resumed := resumed_line(self.config, blocks, self.saved.finished)) is not None:
            self._log(resumed)
        if self.refinement is not None:
            self.refinement = tried(self.refinement)
        if self.config.per_token == "all":
            offsets = np.concatenate([[0], np.cumsum(self.scored.num_positions)])
            result.token_offsets = offsets.astype(np.int64)
        for number, block in enumerate(blocks, start=1):
            self._compute_block(block, f" {number}/{len(blocks)}" if len(blocks) > 1 else "")
        result.top = [self.lists[group][0] for group in rows]
        result.bottom = [self.lists[group][1] for group in rows]
        result.rescored = [self.rescored[group] for group in rows if group in self.rescored]
        if self.details:
            result.details = Details.join(self.details)
        if result.refined is not None:
            self._log(f"refined       {result.refined.convergence_in_words}")

    def _compute_block(self, block: Block, suffix: str) -> None:
        """Computes one block: the scan, then re-scoring or details.

        Args:
            block: The block.
            suffix: Ends the names of its passes.
        """
        prepared = self._scan(block, suffix)
        if self.config.num_rescored:
            del prepared  # its memory is needed for whole gradients
            for piece, groups, part in block.numbered_parts():
                self._rescore(piece, groups, suffix + part)
            return
        columns, indices = np.arange(len(self.scored)), self.result.indices
        for group in block.groups:
            scores = self.result.scores[group]
            self.lists[group] = make_lists(scores, columns, indices, self.list_lengths)
        for piece, groups, part in block.numbered_parts():
            if self.saved.has(piece):
                self.details.append(details_of(self.saved.load(piece)))
                continue
            if prepared is None or prepared.groups != groups:
                prepared = None  # its memory is needed
                rank = self.config.effective_rank
                prepared = self._prepare("queries" + suffix + part, groups, rank)
            pairs = listed_pairs(groups, self.lists)
            details = self._passes.details("details" + suffix + part, prepared, pairs)
            require_scan_agrees(self.context, self.result, details)
            details = self._passes.with_outputs("outputs" + suffix + part, prepared, details)
            self.saved.keep(piece, details_tensors(details))
            self.details.append(details)

    def _scan(self, block: Block, suffix: str) -> PreparedQueries | None:
        """Fills in the scores of a block; its query gradients, or None if the scan was saved."""
        queries = self._queries_of(block.groups)
        if self.saved.has(block.scan):
            put_scan(self.result, self.saved.load(block.scan), block.groups, queries)
            return None
        prepared = self._prepare("queries" + suffix, block.groups, self.config.effective_rank)
        self._note_ranks()
        self._passes.scan(suffix, prepared)
        self.saved.keep(block.scan, scan_tensors(self.result, block.groups, queries))
        return prepared

    def _queries_of(self, groups: list[int]) -> list[int]:
        return [query for group in groups for query in self.queries.members[group]]

    def _prepare(self, name: str, groups: list[int], rank: int | None) -> PreparedQueries:
        """Computes query gradients, and fills in the queries' losses."""
        if self.refinement is not None:
            prepared = self.refinement.prepare(name, self.queries, groups, rank)
        else:
            prepared = prepare(name, self.context, self.queries, groups, rank)
        for query in self._queries_of(groups):
            self.result.query_losses[query] = prepared.losses[query]
            if (other := self.queries.against[query]) is not None:
                self.result.against_losses[query] = prepared.losses[other]
        return prepared

    def _note_ranks(self) -> None:
        asked = self.config.effective_rank
        if asked is None or self.result.ranks:
            return
        self.result.ranks = {module.name: rank_in(module, asked) for module in self.context.modules}
        reduced = {name: rank for name, rank in self.result.ranks.items() if rank != asked}
        if reduced:
            name, rank = next(iter(reduced.items()))
            self._log(
                f"rank          {asked} is more than {len(reduced)} of {len(self.result.ranks)} "
                f"modules have: reduced there, to {rank} in {name}"
            )

    def _rescore(self, piece: str, groups: list[int], suffix: str) -> None:
        """Lists some query groups by exact scores, from whole gradients, after a low-rank scan.

        Args:
            piece: The piece's name.
            groups: Indices of the query groups.
            suffix: Ends the names of its passes.
        """
        chosen = {
            group: choose_for_rescoring(
                self.result, group, self.config.num_rescored, self.list_lengths
            )
            for group in groups
        }
        queries, details, prepared = self._queries_of(groups), None, None
        tensors: dict[str, Tensor]
        if self.saved.has(piece):
            tensors = self.saved.load(piece)
            put_losses(self.result, tensors, queries)
        else:
            prepared = self._prepare("whole queries" + suffix, groups, None)
            pairs = [
                (slot, column)
                for slot, group in enumerate(groups)
                for column in chosen[group].columns()
            ]
            details = self._passes.details("re-score" + suffix, prepared, pairs)
            tensors = {
                "exact_rows": torch.from_numpy(details.rows),
                "exact_columns": torch.from_numpy(details.columns),
                "exact_scores": details.module_scores.sum(1),
                **losses_tensors(self.result, queries),
            }
        self._take_exact(tensors, chosen)
        if details is not None and prepared is not None and self.config.per_token != "none":
            listed = self._only_listed(details, groups)
            listed = self._passes.with_outputs("outputs" + suffix, prepared, listed)
            tensors |= details_tensors(listed)
        if details is not None:
            self.saved.keep(piece, tensors)
        if self.config.per_token != "none":
            self.details.append(details_of(tensors))

    def _take_exact(self, tensors: Mapping[str, Tensor], chosen: Mapping[int, Chosen]) -> None:
        """Makes the lists of some query groups from the exact scores in a piece's tensors."""
        pair_groups, pair_columns = tensors["exact_rows"].numpy(), tensors["exact_columns"].numpy()
        for group, sequences in chosen.items():
            pairs = np.flatnonzero(pair_groups == group)
            exact = tensors["exact_scores"][torch.from_numpy(pairs)]
            self.lists[group], self.rescored[group] = exact_lists(
                self.result, group, pair_columns[pairs], exact, sequences, self.list_lengths
            )

    def _only_listed(self, details: Details, groups: list[int]) -> Details:
        """The details of those pairs whose sequence is listed for the query group."""
        listed = {(groups[slot], column) for slot, column in listed_pairs(groups, self.lists)}
        pairs = zip(details.rows.tolist(), details.columns.tolist(), strict=True)
        is_listed = [k for k, pair in enumerate(pairs) if pair in listed]
        return details.take(np.array(is_listed, dtype=np.int64))
