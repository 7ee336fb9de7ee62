"""How a fit is arranged so that it fits into the workers' memory.

Three things make a worker hold less, and each costs something:

    gradient checkpointing    each layer's forward is repeated in the backward
    shard                     captured rows travel to the owners of factors
    partitions                each has a pair of passes of its own

So passes are kept few first, and then layers are repeated only if they have to be. What is
configured is kept to.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ekfac_dist.config import FactorsConfig
from ekfac_dist.fit.partition import partition
from ekfac_dist.fit.worker_memory import Memory
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.passes.owners import Places

Group = Sequence[TrackedModule]


@dataclass(frozen=True)
class Arrangement:
    """One way of a fit.

    Attributes:
        shard: D, the number of workers that share one copy of the factors.
        checkpoints: Whether layers keep their inputs alone, and are computed again in the backward.
        groups: Groups of modules, a pair of passes each.
    """

    shard: int
    checkpoints: bool
    groups: Sequence[Group]


@dataclass(frozen=True)
class Limits:
    """Free memory of the worker that has least.

    Attributes:
        device: Bytes of its device.
        host: Bytes of its host, if its device is a GPU.
    """

    device: float
    host: float = math.inf

    def hold(self, memory: Memory) -> bool:
        """Whether it is enough."""
        return memory.lack(self.device, self.host) is None


Needed = Callable[[Group, Places, bool], Memory]


def arrange(
    modules: Group,
    workers: int,
    factors: FactorsConfig,
    checkpointing: bool | Literal["auto"],
    needed: Needed,
    limits: Limits,
) -> Arrangement:
    """The cheapest arrangement that fits; if none does, that which needs least.

    Args:
        modules: All tracked modules, in model order.
        workers: W.
        factors: Gives the partitions and the shard, "auto" or fixed.
        checkpointing: Whether layers are repeated, "auto" or fixed.
        needed: The memory that a worker needs for a group, with given owners, with or without
            layers that are repeated.
        limits: What workers have.
    """
    shards = divisors(workers) if factors.shard == "auto" else [factors.shard]
    modes = [False, True] if checkpointing == "auto" else [checkpointing]
    places = {shard: Places.of(modules, shard) for shard in shards}
    fixed = 1 if factors.partitions == "auto" else factors.partitions
    groups = partition(modules, fixed)

    def fits(group: Group, shard: int, checkpoints: bool) -> bool:
        return limits.hold(needed(group, places[shard], checkpoints))

    for checkpoints in modes:
        for shard in shards:
            if all(fits(group, shard, checkpoints) for group in groups):
                return Arrangement(shard, checkpoints, groups)
    shard = shards[-1]
    if factors.partitions != "auto":
        return Arrangement(shard, modes[-1], groups)
    found: list[tuple[int, bool, Sequence[Group]]] = []
    for checkpoints in modes:
        fewest = _fewest_groups(modules, lambda group, r=checkpoints: fits(group, shard, r))
        if fewest is not None:
            found.append((len(fewest), checkpoints, fewest))
    if not found:
        return Arrangement(shard, modes[-1], partition(modules, len(modules)))
    _, checkpoints, fewest = min(found, key=lambda one: one[:2])
    return Arrangement(shard, checkpoints, fewest)


def divisors(workers: int) -> list[int]:
    """The numbers of workers that can share one copy of the factors, ascending."""
    return [number for number in range(1, workers + 1) if workers % number == 0]


def most_needed(arrangement: Arrangement, modules: Group, needed: Needed) -> Memory:
    """The memory that a worker needs for the group that needs most.

    Args:
        arrangement: The arrangement.
        modules: All tracked modules, in model order.
        needed: As for `arrange`.
    """
    places = Places.of(modules, arrangement.shard)
    of_groups = [needed(group, places, arrangement.checkpoints) for group in arrangement.groups]
    return max(of_groups, key=lambda memory: memory.peak)


def _fewest_groups(modules: Group, fits: Callable[[Group], bool]) -> Sequence[Group] | None:
    """The smallest number of groups that each fit; None if no number does."""
    families = len({module.input for module in modules})
    # Every number up to 64, then steps of a sixteenth, and at last a group for each shared input.
    numbers = [n for n in range(1, 65) if n < families]
    while numbers and numbers[-1] >= 64 and numbers[-1] * 17 // 16 < families:
        numbers.append(numbers[-1] * 17 // 16)
    for number in (*numbers, families):
        groups = partition(modules, number)
        if all(map(fits, groups)):
            return groups
    return None
