"""Plans the work: blocks of query groups, and the pieces in which a block is computed and saved.

A block holds the query groups whose gradients fit the memory budget together; the training data is
scanned once per block. Each block is computed in pieces. Those of block 2, for example, are

    scan-2                      scores of all sequences
    details-2                   then: scores of positions, layers and modules for listed sequences
    rescore-2-1, rescore-2-2    or: exact scores, and details, of the sequences that the scan ranks
                                first and last; for as many groups at a time as fit the budget with
                                whole gradients

Only arithmetic; nothing is computed or saved here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ekfac_dist.config import ScoresConfig
from ekfac_dist.data.examples import Examples
from ekfac_dist.influence.context import ScoringContext
from ekfac_dist.influence.preconditioned import bytes_per_group
from ekfac_dist.influence.scores import InfluenceScores


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


def plan_blocks(num_groups: int, context: ScoringContext, config: ScoresConfig) -> list[Block]:
    """Cuts all query groups into blocks; a group that exceeds the budget alone is a block.

    Args:
        num_groups: Number of query groups, 1 or more.
        context: Gives the modules and the gradients' dtype.
        config: The scores that are asked for, and the memory budget.
    """
    blocks = []
    scanned = _cut_into_blocks(range(num_groups), context, config, config.effective_rank)
    for number, groups in enumerate(scanned, start=1):
        following = {}
        if config.rescore:
            parts = enumerate(_cut_into_blocks(groups, context, config, None), start=1)
            following = {f"rescore-{number}-{k}": part for k, part in parts}
        elif config.per_token != "none":
            following = {f"details-{number}": groups}
        blocks.append(Block(groups, f"scan-{number}", following))
    return blocks


def _cut_into_blocks(
    groups: Sequence[int], context: ScoringContext, config: ScoresConfig, rank: int | None
) -> list[list[int]]:
    """Parts of the groups whose gradients of a rank (None: whole) fit the budget together."""
    each = bytes_per_group(context.modules, rank, context.dtype)
    size = max(1, int(config.query_memory_gb * 1e9 // each))
    return [list(groups[k : k + size]) for k in range(0, len(groups), size)]


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
