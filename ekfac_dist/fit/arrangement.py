"""How a fit is arranged so that it fits into the workers' memory.

Four things make a worker hold less, and each costs something:

    gradient checkpointing    each layer's forward is repeated in the backward
    shard                     captured rows travel to the owners of factors
    smaller steps             more of them, each less efficient
    partitions                each has a pair of passes of its own

So passes are kept few first, then steps large. Then every worker keeps a whole copy of the factors,
if need be with gradient checkpointing; else as few workers as can share one, if need be with it.
What is configured is kept to; `batch_tokens` is the most that a step may have.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

from ekfac_dist.config import Checkpointing, FactorsConfig
from ekfac_dist.fit.partition import partition
from ekfac_dist.fit.worker_memory import Memory
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.passes.owners import Places, divisors

Group = Sequence[TrackedModule]


@dataclass(frozen=True)
class Arrangement:
    """How a fit is divided, so that it fits into memory.

    Attributes:
        shard: D, the number of workers that share one copy of the factors.
        checkpoints: Whether layers keep their inputs alone, and are computed again in the backward.
        step_tokens: Most positions of a step.
        groups: Groups of modules, a pair of passes each.
    """

    shard: int
    checkpoints: bool
    step_tokens: int
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
        """Whether they are enough for a worker."""
        return memory.lack(self.device, self.host) is None


Needed = Callable[[Group, Places, bool, int], Memory]


def arrange(
    modules: Group,
    workers: int,
    factors: FactorsConfig,
    checkpointing: Checkpointing,
    step_sizes: Sequence[int],
    needed: Needed,
    limits: Limits,
) -> Arrangement:
    """The cheapest arrangement that fits; if none does, that which needs least.

    Args:
        modules: All tracked modules, in model order.
        workers: W.
        factors: Gives the partitions and the shard, "auto" or fixed.
        checkpointing: Whether layers are computed again in the backward, "auto" or fixed.
        step_sizes: Positions that a step may have at most, descending; see `step_sizes`.
        needed: The memory that a worker needs for a group, with given owners, with or without
            gradient checkpointing, in steps of a given size.
        limits: What workers have.
    """
    shards = divisors(workers) if factors.shard == "auto" else [factors.shard]
    modes = [False, True] if checkpointing == "auto" else [checkpointing]
    places = {shard: Places.of(modules, shard) for shard in shards}
    groups = partition(modules, 1 if factors.partitions == "auto" else factors.partitions)

    def fits(group: Group, shard: int, checkpoints: bool, tokens: int) -> bool:
        return limits.hold(needed(group, places[shard], checkpoints, tokens))

    # Nothing needs less than small steps with checkpointing: other shards need not be looked into.
    possible = [
        shard
        for shard in shards
        if all(fits(group, shard, modes[-1], step_sizes[-1]) for group in groups)
    ]
    for tokens, shard, checkpoints in product(step_sizes, possible, modes):
        if all(fits(group, shard, checkpoints, tokens) for group in groups):
            return Arrangement(shard, checkpoints, tokens, groups)
    shard, tokens = shards[-1], step_sizes[-1]
    if factors.partitions != "auto":
        return Arrangement(shard, modes[-1], tokens, groups)
    # Groups become fewer with smaller steps: more of the memory is left for sums.
    found: list[Arrangement] = []
    for checkpoints in modes:
        fit = partial(fits, shard=shard, checkpoints=checkpoints, tokens=tokens)
        fewest = _fewest_groups(modules, fit)
        if fewest is None:
            continue
        largest = next(
            size
            for size in step_sizes
            if all(fits(group, shard, checkpoints, size) for group in fewest)
        )
        found.append(Arrangement(shard, checkpoints, largest, fewest))
    if not found:
        return Arrangement(shard, modes[-1], tokens, partition(modules, len(modules)))
    return min(found, key=lambda one: (len(one.groups), -one.step_tokens))


def step_sizes(most: int, longest: int) -> list[int]:
    """Sizes of steps to choose from, in positions, descending: each half of the one before.

    Args:
        most: The largest.
        longest: Positions of the longest sequence, which a step has to hold.
    """
    sizes = [most]
    while sizes[-1] // 2 >= max(1, longest):
        sizes.append(sizes[-1] // 2)
    return sizes


def most_needed(arrangement: Arrangement, modules: Group, needed: Needed, limits: Limits) -> Memory:
    """The memory that a worker needs for the group that needs most, or more than there is.

    Args:
        arrangement: The arrangement.
        modules: All tracked modules, in model order.
        needed: As for `arrange`.
        limits: As for `arrange`.
    """
    places = Places.of(modules, arrangement.shard)
    of_groups = [
        needed(group, places, arrangement.checkpoints, arrangement.step_tokens)
        for group in arrangement.groups
    ]
    lacking = [memory for memory in of_groups if not limits.hold(memory)]
    return max(lacking or of_groups, key=lambda memory: memory.peak)


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
