"""Which worker decomposes which factor, and when: rounds of one factor a worker at most.

Shares are balanced by n³: the largest factor first, each to the worker with least to do. In a round
as many workers of a host, or of a device, take part as its memory allows.
"""

import socket
from collections import Counter
from collections.abc import Mapping

from ekfac_dist.curvature.eigenbasis import workspace_bytes
from ekfac_dist.data.batch_plan import assign_batches
from ekfac_dist.fit.offloading import free_bytes
from ekfac_dist.runtime.logs import log_on_main
from ekfac_dist.runtime.memory import as_text
from ekfac_dist.runtime.processes import World


def rounds(
    costs: Mapping[str, int],
    largest: int,
    world: World,
    *,
    sharded: bool,
    places: Mapping[str, int] | None = None,
    shard: int = 1,
) -> list[dict[int, str]]:
    """The rounds of decompositions, each {rank: factor}; a collective if `sharded`.

    Factors come in model order; the costliest first if several workers take part.

    Args:
        costs: n³ of each factor, summed over its blocks.
        largest: n of the largest block.
        world: The workers.
        sharded: Whether every worker decomposes factors that it holds; else worker 0 all.
        places: The place of each factor's owner; None: all are 0.
        shard: Number of workers that share one copy of the factors.
    """
    if not costs:
        return []
    if not sharded:
        return [{0: factor} for factor in costs]
    hosts = world.gather((socket.gethostname(), str(world.device), free_bytes(world.device)))
    where = [(host, device) for host, device, _ in hosts]
    need = workspace_bytes(largest)
    most = {(host, device): free // need for host, device, free in hosts}
    taken: Counter[tuple[str, str]] = Counter()
    ranks = []
    for rank, machine in enumerate(where):
        taken[machine] += 1
        if taken[machine] <= most[machine] or rank == 0:  # which would have to do it alone, too
            ranks.append(rank)
    at_once = len(ranks)
    if shard > 1:  # every owner has to take its turn
        at_once = sum(min(there, max(1, most[place])) for place, there in Counter(where).items())
    if at_once < min(len(where), len(costs)):
        free = min(free for _, _, free in hosts)
        log_on_main(
            world,
            f"decomposition by {at_once} of {len(where)} workers at a time: the largest takes "
            f"{as_text(need)}, and {as_text(free)} are free where there is least",
        )
    names = list(costs)
    if len(ranks) > 1 or shard > 1:
        names.sort(key=lambda factor: -costs[factor])  # a round is as long as its longest
    left: dict[int, list[str]] = {}
    for place in range(shard):
        own = [name for name in names if places is None or places[name] == place]
        holders = [rank for rank in ranks if rank % shard == place] or [place]
        parts = assign_batches([costs[name] for name in own], len(holders))
        for rank, part in zip(holders, parts, strict=True):
            left[rank] = [own[number] for number in part]
    found = []
    while any(left.values()):
        found.append(_next_round(left, costs, where, most))
    return found


def _next_round(
    left: Mapping[int, list[str]],
    costs: Mapping[str, int],
    where: list[tuple[str, str]],
    most: Mapping[tuple[str, str], int],
) -> dict[int, str]:
    """One round, whose factors are removed from what is left.

    Args:
        left: The factors that each worker has still to decompose, by rank.
        costs: n³ of each factor.
        where: Host and device of each worker.
        most: How many workers may decompose at the same time there.
    """
    busiest_first = sorted(left, key=lambda rank: -sum(costs[factor] for factor in left[rank]))
    taken: Counter[tuple[str, str]] = Counter()
    chosen = {}
    for rank in busiest_first:
        # An owner decomposes its factors even if there is no memory for it: nobody else has them.
        if left[rank] and taken[where[rank]] < max(1, most[where[rank]]):
            taken[where[rank]] += 1
            chosen[rank] = left[rank].pop(0)
    return dict(sorted(chosen.items()))
