"""From queries and training sequences to scores: blocks of queries, one scan each, then details.

for each block of rows that fits the memory budget
    query gradients      whole, or of low rank
    scan                 every training sequence, once
    re-score             if asked for: whole gradients, for the ends of the scan's scores alone
    details              scores of positions, layers and modules of what is listed

The scan of a block, and what follows it, are pieces of the work: `SavedBlocks` keeps what each came
to, and a piece that is there already is loaded instead.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.config import DEFAULT_TOP_K, ScoresConfig
from ekfac_dist.data.batches import worker_batches
from ekfac_dist.data.examples import Examples, TaskExamples
from ekfac_dist.errors import ConfigError, ModelError
from ekfac_dist.influence.agreement import spearman
from ekfac_dist.influence.context import DATA_LABELS, OVERFLOW_ADVICE, STORED, ScoringContext
from ekfac_dist.influence.preconditioned import LowRankGradients, PreparedQueries, bytes_per_row
from ekfac_dist.influence.queries import QuerySet
from ekfac_dist.influence.query_gradients import prepare
from ekfac_dist.influence.saved_blocks import (
    SavedBlocks,
    details_of,
    details_tensors,
    losses_tensor,
    put_losses,
    put_rows,
    put_scan,
    scan_tensors,
)
from ekfac_dist.influence.scan import DetailSums, Pairs, Scan
from ekfac_dist.influence.scores import Details, InfluenceScores, Listed, Rescored
from ekfac_dist.models.modules import EXPERT, layer_name
from ekfac_dist.passes.context import PassContext
from ekfac_dist.passes.one_pass import SummingObserver, run_pass
from ekfac_dist.passes.sequences import exactly_batched, require_harmless_padding
from ekfac_dist.passes.state import PassState
from ekfac_dist.runtime.memory import as_text

# How far the scan and the details may be apart, relative to the modules' scores, by the model's
# dtype. Rounding that depends on a batch's shape stays below; rounding may choose another expert.
_OTHER_SCORES = {torch.float64: 1e-4, torch.float32: 0.01}
_OTHER_SCORES_OF_EXPERTS = 0.1
_OTHER_SCORES_IN_16_BITS = 0.3


def compute_scores(
    context: ScoringContext,
    queries: QuerySet,
    scored: Examples,
    config: ScoresConfig,
    say: Callable[[str], None],
    saved: SavedBlocks | None = None,
) -> InfluenceScores:
    """Scores training sequences for queries.

    Args:
        context: Model (prepared), factors, damping, workers.
        queries: The queries.
        scored: The training sequences that are scored.
        config: Which scores.
        say: Takes a line for people.
        saved: Where finished pieces are kept; None: nowhere.

    Raises:
        UserError: Anything that the user can mend, on every worker.
    """
    top_k, bottom_k = list_lengths(config, len(scored))
    if isinstance(scored, TaskExamples):
        require_harmless_padding(
            context.model, scored, context.task, context.world, context.batch_tokens
        )
    scored = exactly_batched(
        context.model, scored, context.task, context.world, context.batch_tokens
    )
    needs_norms = config.self_influence or config.normalize != "none"
    context = replace(context, in_eigenbasis=needs_norms)
    names = tuple(module.name for module in context.modules)
    layers = tuple(dict.fromkeys(map(layer_name, names)))
    num_rows = len(queries.rows)
    result = InfluenceScores(
        scores=torch.zeros(num_rows, len(scored), dtype=context.dtype),
        indices=scored.indices,
        members=queries.rows,
        training_size=config.training_size,
        normalize=config.normalize,
        norms=torch.ones(len(scored), dtype=context.dtype),
        query_norms=torch.ones(num_rows, dtype=context.dtype),
        modules=names,
        layers=layers,
        layer_of=np.array([layers.index(layer_name(name)) for name in names]),
        damping=dict(context.damping),
        query_losses=[math.nan] * len(queries.sequences),
    )
    run = _Scoring(
        context, queries, scored, config, (top_k, bottom_k), result, say, saved or SavedBlocks()
    )
    run.all_blocks()
    return result


def list_lengths(config: ScoresConfig, num_scored: int) -> tuple[int, int]:
    """How many sequences each list of a query has: (most positive, most negative).

    Raises:
        ConfigError: More than there are.
    """
    top_k = min(DEFAULT_TOP_K, num_scored) if config.top_k is None else config.top_k
    bottom_k = top_k if config.bottom_k is None else config.bottom_k
    for name, value in (("top_k", top_k), ("bottom_k", bottom_k), ("rescore", config.rescore)):
        if value > num_scored:
            raise ConfigError(
                f"scores.{name} is {value}, but only {num_scored} sequences are scored; give "
                f"{num_scored} or less."
            )
    if 0 < config.rescore < max(top_k, bottom_k):
        raise ConfigError(
            f"scores.rescore is {config.rescore}, but lists of {max(top_k, bottom_k)} are asked "
            "for; score at least as many again."
        )
    return top_k, bottom_k


@dataclass
class _Scoring:
    """One answer in the making: what it is computed from, and what there is of it so far."""

    context: ScoringContext
    queries: QuerySet
    scored: Examples
    config: ScoresConfig
    list_lengths: tuple[int, int]
    result: InfluenceScores
    say: Callable[[str], None]
    saved: SavedBlocks
    listed: dict[int, tuple[Listed, Listed]] = field(default_factory=dict)
    rescored: dict[int, Rescored] = field(default_factory=dict)
    details: list[Details] = field(default_factory=list)

    def all_blocks(self) -> None:
        """Answers every row."""
        rows = list(range(len(self.queries.rows)))
        rank, result = self.config.effective_rank, self.result
        blocks = self._blocks(rows, rank)
        result.num_scans = len(blocks)
        one = as_text(bytes_per_row(self.context.modules, rank, self.context.dtype))
        kind = "whole" if rank is None else f"of rank {rank}"
        scans = f"{len(blocks)} scan{'s' * (len(blocks) > 1)} of the data"
        budget = self.config.query_memory_gb * 1e9
        if bytes_per_row(self.context.modules, rank, self.context.dtype) > budget:
            self.say(
                f"memory        one row's gradients alone take {one}, more than "
                f"scores.query_memory_gb allows ({as_text(budget)}); a lower scores.rank would help"
            )
        self.say(
            f"queries       {len(self.queries.sequences)} in {len(rows)} rows of scores; gradients "
            f"{kind}, {one} a row, {len(blocks[0])} at a time: {scans}"
        )
        self.saved.require_disk_space(*self._bytes_on_disk())
        self._tell_what_is_done(blocks)
        if self.config.per_token == "all":
            offsets = np.concatenate([[0], np.cumsum(self.scored.num_positions)])
            result.token_offsets = offsets.astype(np.int64)
        for number, block in enumerate(blocks, start=1):
            self._answer(number, block, f" {number}/{len(blocks)}" if len(blocks) > 1 else "")
        result.top = [self.listed[row][0] for row in rows]
        result.bottom = [self.listed[row][1] for row in rows]
        result.rescored = [self.rescored[row] for row in rows if row in self.rescored]
        if self.details:
            result.details = Details.join(self.details)

    def _blocks(self, rows: Sequence[int], rank: int | None) -> list[list[int]]:
        """Cuts rows into blocks whose gradients fit the budget, one row at least."""
        one = bytes_per_row(self.context.modules, rank, self.context.dtype)
        size = max(1, int(self.config.query_memory_gb * 1e9 // one))
        return [list(rows[k : k + size]) for k in range(0, len(rows), size)]

    def _pieces(self, number: int, rows: list[int]) -> tuple[str, dict[str, list[int]]]:
        """Names of a block's pieces: of its scan, and of what follows it, each with its rows."""
        if self.config.rescore:
            parts = enumerate(self._blocks(rows, None), start=1)
            return f"scan-{number}", {f"rescore-{number}-{k}": some for k, some in parts}
        follows = {} if self.config.per_token == "none" else {f"details-{number}": rows}
        return f"scan-{number}", follows

    def _tell_what_is_done(self, blocks: Sequence[list[int]]) -> None:
        """Says how many blocks an earlier start of the run has finished."""
        pieces = [self._pieces(number, rows) for number, rows in enumerate(blocks, start=1)]
        scanned = sum(self.saved.has(scan) for scan, _ in pieces)
        follow = [name for _, following in pieces for name in following]
        followed = sum(map(self.saved.has, follow))
        if not scanned + followed:
            return
        line = f"goes on       {scanned} of {len(blocks)} blocks are scored"
        if follow:
            what = "parts re-scored" if self.config.rescore else "in detail"
            line += f", {followed} of {len(follow)} {what}"
        self.say(line)

    def _bytes_on_disk(self) -> tuple[int, int]:
        """About what results and saved pieces will take: (results, pieces)."""
        result, rows, columns = self.result, len(self.result.scores), len(self.scored)
        config, positions = self.config, int(self.scored.num_positions.sum())
        parts = config.per_module * len(result.modules) + config.per_layer * len(result.layers)
        numbers = rows * columns * (1 + parts) + 2 * columns
        if config.per_token == "all":
            numbers += rows * positions
        if config.per_token != "none":
            pairs = rows * min(sum(self.list_lengths), columns)
            each = len(result.modules) + len(result.layers) * positions // columns
            numbers += pairs * each
        return numbers * torch.float32.itemsize, numbers * self.context.dtype.itemsize

    def _answer(self, number: int, rows: list[int], suffix: str) -> None:
        """Scans the data for one block, and looks closer at the ends of its scores."""
        scan, following = self._pieces(number, rows)
        queries, prepared = self._queries_of(rows), None
        if self.saved.has(scan):
            put_scan(self.result, self.saved.load(scan), rows, queries)
        else:
            prepared = self._prepare("queries" + suffix, rows, self.config.effective_rank)
            if self.config.effective_rank is not None:
                self._note_ranks(prepared)
            self._scan(prepared, "scan" + suffix)
            self.saved.keep(scan, scan_tensors(self.result, rows, queries))
        if self.config.rescore:
            del prepared  # whole gradients need the room
            for k, (piece, some) in enumerate(following.items(), start=1):
                part = f" (part {k})" if len(some) < len(rows) else ""
                self._score_again(piece, some, suffix + part)
            return
        columns = np.arange(len(self.scored))
        for row in rows:
            self.listed[row] = self._ends(self.result.scores[row], columns, self.list_lengths)
        for piece in following:
            if self.saved.has(piece):
                self.details.append(details_of(self.saved.load(piece)))
                continue
            if prepared is None:
                prepared = self._prepare("queries" + suffix, rows, self.config.effective_rank)
            details = self._detail("details" + suffix, prepared, self._listed_pairs(rows))
            self._require_scan_agrees(details)
            self.saved.keep(piece, details_tensors(details))
            self.details.append(details)

    def _queries_of(self, rows: list[int]) -> list[int]:
        return [number for row in rows for number in self.queries.rows[row]]

    def _require_scan_agrees(self, details: Details) -> None:
        """Refuses details whose sums are not the scores of the scan with the same query gradients.

        The two were computed in other batches, on which nothing may depend but rounding.

        Raises:
            ModelError: They are not.
        """
        allowed = _OTHER_SCORES.get(self.context.model_dtype, _OTHER_SCORES_IN_16_BITS)
        if any(module.kind == EXPERT for module in self.context.modules):
            allowed = max(allowed, _OTHER_SCORES_OF_EXPERTS)
        columns = torch.from_numpy(details.columns)
        for row in np.unique(details.rows).tolist():
            mine = torch.from_numpy(np.flatnonzero(details.rows == row))
            parts = details.module_scores[mine].double()
            scanned = self.result.scores[row][columns[mine]].double()
            # Beside the parts, for a score may be a small difference of large ones.
            difference = (parts.sum(1) - scanned).norm() / parts.norm()
            if difference > allowed:
                raise ModelError(
                    f"The scores of query {row}'s listed sequences, summed over their positions, "
                    f"are not those of the scan (relative difference {difference:.2g}), though "
                    "only the batches differ: what this model gives for a sequence depends on its "
                    "batch. Set batch_tokens: 1, which gives each sequence a batch of its own."
                )

    def _prepare(self, name: str, rows: list[int], rank: int | None) -> PreparedQueries:
        prepared = prepare(name, self.context, self.queries, rows, rank)
        for number, loss in prepared.losses.items():
            self.result.query_losses[number] = loss
        return prepared

    def _note_ranks(self, prepared: PreparedQueries) -> None:
        first_time = not self.result.ranks
        for name, gradients in prepared.gradients.items():
            assert isinstance(gradients, LowRankGradients)
            self.result.ranks[name] = gradients.left_QOr.shape[-1]
        asked = self.config.effective_rank
        reduced = {name: rank for name, rank in self.result.ranks.items() if rank != asked}
        if reduced and first_time:
            name, rank = next(iter(reduced.items()))
            self.say(
                f"rank          {asked} is more than {len(reduced)} of {len(self.result.ranks)} "
                f"modules have: reduced there, to {rank} in {name}"
            )

    def _scan(self, prepared: PreparedQueries, name: str) -> None:
        config, result, rows = self.config, self.result, prepared.rows
        parts = None
        if config.per_module:
            parts = np.arange(len(result.modules))
        elif config.per_layer:
            parts = result.layer_of
        scan = Scan(
            self.context,
            prepared,
            self.scored,
            parts=parts,
            with_norms=self.context.in_eigenbasis and 0 in rows,  # they are no query's
            with_positions=config.per_token == "all",
        )
        self._pass(name, scan, np.arange(len(self.scored)))
        if scan.norms is not None:
            self._take_norms(scan.norms.cpu())
        if config.normalize == "cosine":
            own = prepared.self_influence.clamp(min=0).sqrt().cpu()
            result.query_norms[rows] = own.to(self.context.dtype)
        scale = result.scale(rows, slice(None))
        result.scores[rows] = scan.scores.cpu() * scale
        if scan.part_scores is not None:
            self._take_parts(scan.part_scores.cpu() * scale[:, None], rows)
        if scan.position_scores is not None:
            lengths = self.scored.num_positions
            owner = np.repeat(np.arange(len(self.scored)), lengths)
            positions = scan.position_scores.cpu() * scale[:, owner]
            put_rows(result, "token_scores", positions, rows)

    def _pass(self, name: str, observer: SummingObserver, columns: np.ndarray) -> None:
        """Runs some of the scored sequences through the model, shared out over the workers."""
        context, world = self.context, self.context.world
        some = self.scored.take(columns)
        own = worker_batches(
            some.num_positions, context.batch_tokens, world.size, world.rank, some.equal_above
        )
        work = PassContext(
            context.model,
            some,
            own,
            world,
            context.dtype,
            context.show_progress,
            wider=OVERFLOW_ADVICE,
            task=context.task,
        )
        state = PassState(own, STORED)
        run_pass(name, work, context.modules, observer, DATA_LABELS, state=state)

    def _take_norms(self, sums: Tensor) -> None:
        """Makes the normalisation's norms of ⟨G, (F + λ)⁻¹ G⟩ and ‖(F + λ)⁻¹ G‖²."""
        own, solved = sums.clamp(min=0)
        if self.config.self_influence:
            self.result.self_influence = own
        if self.config.normalize in ("cosine", "relatif_l"):
            self.result.norms = own.sqrt()
        elif self.config.normalize == "relatif_theta":
            self.result.norms = solved.sqrt()

    def _take_parts(self, parts: Tensor, rows: list[int]) -> None:
        """Keeps the scores of modules, of layers, or of both."""
        result = self.result
        if self.config.per_module:
            put_rows(result, "module_scores", parts, rows)
        if self.config.per_layer:
            if self.config.per_module:
                sums = parts.new_zeros(len(rows), len(result.layers), parts.shape[2])
                parts = sums.index_add_(1, torch.from_numpy(result.layer_of), parts)
            put_rows(result, "layer_scores", parts, rows)

    def _ends(
        self, scores: Tensor, columns: np.ndarray, lengths: tuple[int, int]
    ) -> tuple[Listed, Listed]:
        """The largest and the smallest of some scores; equal ones in data order."""
        orders = [
            torch.sort(scores, descending=descending, stable=True).indices[:length]
            for descending, length in zip((True, False), lengths, strict=True)
        ]
        picked = [columns[order.numpy()] for order in orders]
        top, bottom = (
            Listed(mine, self.result.indices[mine], scores[order])
            for mine, order in zip(picked, orders, strict=True)
        )
        return top, bottom

    def _listed_pairs(self, rows: list[int]) -> list[tuple[int, int]]:
        """(place in the block, column) of whatever is in a list of these rows."""
        return [
            (place, int(column))
            for place, row in enumerate(rows)
            for ends in self.listed[row]
            for column in ends.columns
        ]

    def _detail(
        self, name: str, prepared: PreparedQueries, wanted: Sequence[tuple[int, int]]
    ) -> Details:
        """Runs the sequences of some pairs once more; scores normalised as all are."""
        pairs = Pairs.of(wanted, self.scored)
        sums = DetailSums(self.context, prepared, self.scored, pairs, self.result.layer_of)
        self._pass(name, sums, np.unique(pairs.columns))
        rows = np.array(prepared.rows, dtype=np.int64)[pairs.places]
        scale = self.result.pair_scale(rows, pairs.columns)
        owner = np.repeat(np.arange(len(rows)), np.diff(pairs.offsets))
        return Details(
            rows,
            pairs.columns,
            pairs.offsets,
            sums.layer_position_scores.cpu() * scale[owner],
            sums.module_scores.cpu() * scale[:, None],
        )

    def _score_again(self, piece: str, rows: list[int], suffix: str) -> None:
        """Exact scores, by whole gradients, of both ends of the scan's and of an even sample."""
        number, columns = self.config.rescore, np.arange(len(self.scored))
        spread = np.linspace(0, len(columns) - 1, num=number).round().astype(np.int64)
        chosen = {
            row: self._ends(
                self.result.scores[row], columns, (number, number if self.list_lengths[1] else 0)
            )
            for row in rows
        }
        found, queries = None, self._queries_of(rows)
        if self.saved.has(piece):
            kept = self.saved.load(piece)
            put_losses(self.result, kept, queries)
        else:
            prepared = self._prepare("whole queries" + suffix, rows, None)
            wanted = [
                (place, int(column))
                for place, row in enumerate(rows)
                for some in (*(end.columns for end in chosen[row]), spread)
                for column in some
            ]
            found = self._detail("re-score" + suffix, prepared, wanted)
            kept = {
                "exact_rows": torch.from_numpy(found.rows),
                "exact_columns": torch.from_numpy(found.columns),
                "exact_scores": found.module_scores.sum(1),
                "query_losses": losses_tensor(self.result, queries),
            }
        exact_rows, exact_columns = kept["exact_rows"].numpy(), kept["exact_columns"].numpy()
        for row in rows:
            mine = np.flatnonzero(exact_rows == row)
            exact = kept["exact_scores"][torch.from_numpy(mine)]
            self._take_exact(row, exact_columns[mine], exact, chosen[row], spread)
        if found is not None and self.config.per_token != "none":
            listed = {(rows[place], column) for place, column in self._listed_pairs(rows)}
            pairs = zip(found.rows.tolist(), found.columns.tolist(), strict=True)
            kept_pairs = [k for k, pair in enumerate(pairs) if pair in listed]
            kept |= details_tensors(found.take(np.array(kept_pairs, dtype=np.int64)))
        if found is not None:
            self.saved.keep(piece, kept)
        if self.config.per_token != "none":
            self.details.append(details_of(kept))

    def _take_exact(
        self,
        row: int,
        columns: np.ndarray,
        exact: Tensor,
        chosen: tuple[Listed, Listed],
        spread: np.ndarray,
    ) -> None:
        """Lists one row anew by its exact scores, and compares them with the scan's."""
        scanned = self.result.scores[row][torch.from_numpy(columns)]
        self.listed[row] = self._ends(exact, columns, self.list_lengths)
        by_scan = self._ends(scanned, columns, self.list_lengths)
        kept = sum(
            len(np.intersect1d(one.columns, other.columns))
            for one, other in zip(self.listed[row], by_scan, strict=True)
        )

        def correlation(some: np.ndarray) -> float | None:
            among = torch.from_numpy(np.isin(columns, some))
            return spearman(scanned[among], exact[among])

        self.rescored[row] = Rescored(
            columns,
            scanned,
            exact,
            spearman=correlation(spread),
            spearman_top=correlation(chosen[0].columns),
            overlap=kept / sum(self.list_lengths)
            if self.config.rescore > max(self.list_lengths)
            else None,
        )
