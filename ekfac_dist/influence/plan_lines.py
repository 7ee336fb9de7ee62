"""The lines that say, before queries are answered, how that is done, and what is done already."""

from collections.abc import Collection, Iterator, Sequence

from ekfac_dist.config import ScoresConfig
from ekfac_dist.influence.blocks import Block, groups_at_a_time, held_bytes_per_group
from ekfac_dist.influence.context import ScoringContext
from ekfac_dist.runtime.memory import as_text


def plan_lines(
    context: ScoringContext, config: ScoresConfig, num_queries: int, num_rows: int, num_blocks: int
) -> Iterator[str]:
    """Lines about workers, memory and scans.

    Args:
        context: Modules, precision and workers.
        config: The scores that are asked for.
        num_queries: Number of queries.
        num_rows: Number of query groups.
        num_blocks: Number of blocks, each of one scan.
    """
    rank, workers = config.effective_rank, context.world.size
    num_bytes = held_bytes_per_group(context, rank)
    one = as_text(num_bytes)
    if workers > 1:
        yield (
            f"shard         {context.shard}: a copy of the factors and query gradients for "
            f"every {'worker' if context.shard == 1 else f'{context.shard} workers'} of {workers}"
        )
    budget = config.query_memory_gb * 1e9
    if num_bytes > budget:
        yield (
            f"memory        one row's gradients alone take {one}, more than "
            f"scores.query_memory_gb allows ({as_text(budget)}); a lower scores.rank would help"
        )
    at_a_time = min(num_rows, groups_at_a_time(context, config, rank))
    kind = "whole" if rank is None else f"of rank {rank}"
    yield (
        f"queries       {num_queries} in {num_rows} rows of scores; gradients {kind}, {one} a row"
        f"{' on a worker' * (context.shard > 1)}, "
        f"{at_a_time} at a time in {as_text(at_a_time * num_bytes)}: "
        f"{num_blocks} scan{'s' * (num_blocks > 1)} of the data"
    )


def resumed_line(
    config: ScoresConfig, blocks: Sequence[Block], finished: Collection[str]
) -> str | None:
    """How many pieces were finished before this run was resumed; None: none was.

    Args:
        config: The scores that are asked for.
        blocks: The blocks.
        finished: Names of the pieces that were finished.
    """
    scanned = sum(block.scan in finished for block in blocks)
    follow = [piece for block in blocks for piece in block.following]
    followed = sum(piece in finished for piece in follow)
    if not scanned + followed:
        return None
    line = f"goes on       {scanned} of {len(blocks)} blocks are scored"
    if follow:
        passes = "parts re-scored" if config.num_rescored else "in detail"
        line += f", {followed} of {len(follow)} {passes}"
    return line
