"""Who owns which factors, where they are shared out among workers.

Workers form copies of the factors: with W workers and `shard` D there are W / D copies, each shared
out among D workers of consecutive ranks. Modules that read one input, with its A, their S and Λ,
are a family; a family is owned by the worker of the same place in every copy.

    rank    0  1 | 2  3        W = 4, D = 2
    copy    0  0 | 1  1
    place   0  1 | 0  1        rank 0 and rank 2 own the same families

Families are assigned in windows of neighbours, so that within a few layers every owner has
something to do, and balanced over all windows, so that memory and work are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.runtime.processes import World


def families(modules: Sequence[TrackedModule]) -> dict[str, list[TrackedModule]]:
    """The modules that read each input, by the input factor's name, in model order."""
    members: dict[str, list[TrackedModule]] = {}
    for module in modules:
        members.setdefault(module.input, []).append(module)
    return members


def family_cost(members: Sequence[TrackedModule]) -> int:
    """Elements of a family's factors and Λ: its memory, and about proportional to its work."""
    return members[0].input_size ** 2 + sum(
        m.num_outputs**2 + m.num_outputs * m.input_size for m in members
    )


def windows(modules: Sequence[TrackedModule], shard: int) -> list[list[str]]:
    """Input factors of neighbouring families, as few together as can be shared out evenly.

    Args:
        modules: The tracked modules, in the order in which they are called.
        shard: D.
    """
    members = families(modules)
    costs = {name: family_cost(family) for name, family in members.items()}
    parts: list[list[str]] = []
    window: list[str] = []
    for name in members:
        window.append(name)
        own = [costs[each] for each in window]
        if len(window) >= shard and sum(own) >= shard * max(own):
            parts.append(window)
            window = []
    if window:  # too few to be shared out evenly
        parts[-1:] = [[*parts[-1], *window]] if parts else [window]
    return parts


def assign_owners(modules: Sequence[TrackedModule], shard: int) -> dict[str, int]:
    """The place of each family's owner, by the input factor's name.

    Window by window, the costliest family first, each to the owner with least so far.

    Args:
        modules: The tracked modules, in model order.
        shard: D.
    """
    members = families(modules)
    loads = [0] * shard
    places: dict[str, int] = {}
    for window in windows(modules, shard):
        for name in sorted(window, key=lambda each: -family_cost(members[each])):
            place = loads.index(min(loads))
            places[name] = place
            loads[place] += family_cost(members[name])
    return places


@dataclass(frozen=True)
class Owners:
    """A mesh of copies × owners, seen by one worker.

    Attributes:
        shard: D, the number of workers that share one copy of the factors.
        copies: Number of copies.
        place: This worker's place among the owners of its copy.
        ranks: Ranks of the workers of this worker's copy, by place.
        rows: Process group of this worker's copy, for rows; None if D is 1.
        notes: The same workers, for objects on the CPU.
        same_place: Process group of the workers that own the same families; None if there is one.
    """

    shard: int
    copies: int
    place: int
    ranks: Sequence[int]
    rows: dist.ProcessGroup | None = field(default=None, repr=False)
    notes: dist.ProcessGroup | None = field(default=None, repr=False)
    same_place: dist.ProcessGroup | None = field(default=None, repr=False)

    @classmethod
    def of(cls, world: World, shard: int) -> "Owners":
        """The mesh of all workers; a collective.

        Args:
            world: The workers.
            shard: D, which divides their number.
        """
        copies = world.size // shard
        first = world.rank // shard * shard
        ranks = range(first, first + shard)
        if shard == 1:
            return cls(shard, copies, 0, ranks)
        mesh = init_device_mesh(
            world.device.type, (copies, shard), mesh_dim_names=("copies", "owners")
        )
        notes = None
        for copy in range(copies):
            members = list(range(copy * shard, (copy + 1) * shard))
            group = dist.new_group(members, backend="gloo")  # by all workers, in the same order
            notes = group if world.rank in members else notes
        return cls(
            shard,
            copies,
            world.rank - first,
            ranks,
            mesh.get_group("owners"),
            notes,
            mesh.get_group("copies") if copies > 1 else None,
        )

    def owned(
        self, modules: Sequence[TrackedModule], places: Mapping[str, int]
    ) -> list[TrackedModule]:
        """The modules of the families that this worker owns.

        Args:
            modules: In model order.
            places: From `assign_owners`.
        """
        return [module for module in modules if places[module.input] == self.place]
