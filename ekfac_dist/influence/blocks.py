"""Plans the work: blocks of query groups, and the pieces in which a block is computed and saved.

A block holds the query groups whose gradients fit the memory budget together; the training data is
scanned once per block. Each block is computed in pieces, named by their first and last group. Those
of the groups 10 to 19, for example, are

    scan-10-19                          scores of all sequences
    details-10-19                       then: scores of positions, layers and modules for listed
                                        sequences
    rescore-10-13, -14-17 and -18-19    or: exact scores, and details, of the sequences that the
                                        scan ranks first and last; for as many groups at a time as
                                        fit the budget with whole gradients

How many groups fit depends on the number of workers. So a run that is resumed by another number of
them keeps the pieces that are saved, and plans blocks of its own for the groups between those.

Only arithmetic; nothing is computed or saved here.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from ekfac_dist.config import ScoresConfig
from ekfac_dist.curvature.iterative import HELD_BLOCKS
from ekfac_dist.data.examples import Examples
from ekfac_dist.influence.context import ScoringContext
from ekfac_dist.influence.preconditioned import bytes_per_group
from ekfac_dist.influence.scores import InfluenceScores
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.passes.owners import divisors, require_divisor

SCAN, DETAILS, RESCORE = "scan", "details", "rescore"  # kinds of pieces


@dataclass(frozen=True)
class Block:
    """Query groups that are answered with one scan, and the pieces of the work.

    Attributes:
        groups: Indices of the query groups, consecutive.
        scan: Name of the piece that is the scan.
        following: Names of the pieces after the scan, each with the groups that it is of.
    """

    groups: list[int]
    scan: str
    following: dict[str, list[int]]

    def __len__(self) -> int:
        return len(self.groups)

    def numbered_parts(self) -> Iterator[tuple[str, list[int], str]]:
        """(name, groups, what the names of its passes end in) of each piece after the scan."""
        for number, (piece, groups) in enumerate(self.following.items(), start=1):
            yield piece, groups, f" (part {number})" if len(groups) < len(self) else ""


def choose_shard(
    num_groups: int,
    modules: Sequence[TrackedModule],
    dtype: torch.dtype,
    workers: int,
    config: ScoresConfig,
) -> int:
    """Among how many workers a copy of factors and query gradients is shared out.

    By default as few as can hold the gradients of all groups in one block: a scan of the data that
    is saved is worth more than what the rows' travel costs. All workers, if none can.

    Args:
        num_groups: Number of query groups.
        modules: The tracked modules.
        dtype: The gradients' dtype.
        workers: W.
        config: The scores that are asked for, and the memory budget.

    Raises:
        ConfigError: As `require_divisor`.
    """
    require_divisor("scores.shard", config.shard, workers)
    if config.shard != "auto":
        return config.shard
    rank = config.effective_rank
    fits = (
        shard
        for shard in divisors(workers)
        if _groups_in_budget(config, bytes_per_group(modules, rank, dtype, shard)) >= num_groups
    )
    return next(fits, workers)


def groups_at_a_time(context: ScoringContext, config: ScoresConfig, rank: int | None) -> int:
    """How many groups' gradients of a rank (None: whole) fit the budget together, at least 1.

    Refined ones are whole, and held with the other vectors of their solve; where they become
    gradients of low rank afterwards, these and the solve have half of the budget each.
    """
    each = held_bytes_per_group(context, rank)
    share = 0.5 if context.refine.is_on and rank is not None else 1.0
    return max(1, _groups_in_budget(config, each, share))


def refined_at_a_time(context: ScoringContext, config: ScoresConfig, rank: int | None) -> int:
    """How many groups' gradients are refined together, at least 1.

    Args:
        context: Gives the modules and the gradients' dtype.
        config: The scores that are asked for, and the memory budget.
        rank: Rank of the gradients that refined ones become; None: they stay whole.
    """
    each = held_bytes_per_group(context, None)
    return max(1, _groups_in_budget(config, each, 1.0 if rank is None else 0.5))


def held_bytes_per_group(context: ScoringContext, rank: int | None) -> int:
    """Memory of a group's gradients of a rank (None: whole), and of what they are refined with."""
    each = bytes_per_group(context.modules, rank, context.dtype, context.shard)
    return each * HELD_BLOCKS if context.refine.is_on and rank is None else each


def _groups_in_budget(config: ScoresConfig, bytes_each: int, share: float = 1.0) -> int:
    return int(share * config.query_memory_gb * 1e9 // bytes_each)


def plan_blocks(
    num_groups: int,
    context: ScoringContext,
    config: ScoresConfig,
    saved: Collection[str] = (),
) -> list[Block]:
    """Cuts all query groups into blocks; a group that exceeds the budget alone is a block.

    Args:
        num_groups: Number of query groups, 1 or more.
        context: Gives the modules, the gradients' dtype and the workers that share them.
        config: The scores that are asked for, and the memory budget.
        saved: Names of the pieces that are saved.
    """
    rank = config.effective_rank
    at_a_time = groups_at_a_time(context, config, rank)
    kind, size = DETAILS, at_a_time
    if config.num_rescored:
        kind, size = RESCORE, groups_at_a_time(context, config, None)
    blocks = []
    for groups in _parts(SCAN, range(num_groups), at_a_time, saved):
        following: dict[str, list[int]] = {}
        if config.num_rescored or config.per_token != "none":
            following = {_name(kind, part): part for part in _parts(kind, groups, size, saved)}
        blocks.append(Block(groups, _name(SCAN, groups), following))
    return blocks


def _name(kind: str, groups: Sequence[int]) -> str:
    return f"{kind}-{groups[0]}-{groups[-1]}"


def _parts(kind: str, groups: Sequence[int], size: int, saved: Collection[str]) -> list[list[int]]:
    """The groups of each piece of a kind, in order: those that are saved, and others between.

    Args:
        kind: The kind of pieces.
        groups: Indices of all their groups, consecutive.
        size: Number of groups of a piece that is not saved, at most.
        saved: Names of the pieces that are saved, of any kind; those that hold other groups too
            do not count.
    """
    first, end = groups[0], groups[-1] + 1
    ends = {}
    for name in saved:
        if found := re.fullmatch(rf"{kind}-(\d+)-(\d+)", name):
            ends[int(found[1])] = int(found[2]) + 1
    parts = []
    while first < end:
        if first in ends and ends[first] <= end:
            last = ends[first]
        else:
            next_saved = min((start for start in ends if first < start < end), default=end)
            last = min(first + size, next_saved)
        parts.append(list(range(first, last)))
        first = last
    return parts


def bytes_on_disk(
    result: InfluenceScores,
    scored: Examples,
    config: ScoresConfig,
    list_lengths: tuple[int, int],
) -> tuple[int, int]:
    """Approximate size, in bytes, of (the results, all saved pieces).

    Args:
        result: The results, before they are filled in.
        scored: The scored sequences.
        config: The scores that are asked for.
        list_lengths: Lengths of the lists of the (most positive, most negative) sequences.
    """
    num_groups, num_columns = len(result.scores), len(scored)
    num_positions = int(scored.num_positions.sum())
    parts = config.per_module * len(result.modules) + config.per_layer * len(result.layers)
    num_elements = num_groups * num_columns * (1 + parts) + 2 * num_columns
    if config.per_token == "all":
        num_elements += num_groups * num_positions
    if config.per_token != "none":
        num_pairs = num_groups * min(sum(list_lengths), num_columns)
        per_pair = len(result.modules) + len(result.layers) * num_positions // num_columns
        num_elements += num_pairs * per_pair
    return num_elements * 4, num_elements * result.scores.element_size()  # results are float32
