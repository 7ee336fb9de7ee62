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

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

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


@functools.cache
def _mesh(device_type: str, size: tuple[int, int], use: str, everyone: int) -> DeviceMesh:
    """The mesh of a size, made once: its groups keep threads and sockets until the process ends.

    Args:
        device_type: Where the groups' collectives are.
        size: Number of copies, and of owners.
        use: What is sent: notes do not wait for rows.
        everyone: Identifies the group of all workers.
    """
    return init_device_mesh(device_type, size, mesh_dim_names=("copies", "owners"))


@dataclass(frozen=True)
class Owners:
    """A mesh of copies × owners, seen by one worker, and who owns what.

    Attributes:
        shard: D, the number of workers that share one copy of the factors.
        places: The place of each family's owner, by its input factor.
        sum_places: The same by the name of each factor, and of each module.
        place: This worker's place among the owners of its copy.
        copy: The workers of this worker's copy, by place.
        notes: The same workers, for objects on the CPU.
        same_place: The workers that own the same families, by copy.
    """

    shard: int
    places: Mapping[str, int]
    sum_places: Mapping[str, int]
    place: int
    copy: World
    notes: World
    same_place: World

    @classmethod
    def of(cls, world: World, shard: int, modules: Sequence[TrackedModule]) -> "Owners":
        """The mesh of all workers; a collective.

        Args:
            world: The workers.
            shard: D, which divides their number.
            modules: The tracked modules, in model order.
        """
        places = assign_owners(modules, shard)
        sum_places = {
            name: places[module.input]
            for module in modules
            for name in (module.name, module.input, module.output)
        }
        if shard == 1:
            return cls(shard, places, sum_places, 0, world.alone(), world.alone(), world)
        size = (world.size // shard, shard)
        everyone = id(dist.group.WORLD)
        mesh = _mesh(world.device.type, size, "rows", everyone)
        notes = _mesh("cpu", size, "notes", everyone)
        return cls(
            shard,
            places,
            sum_places,
            world.rank % shard,
            world.within(mesh.get_group("owners")),
            world.within(notes.get_group("owners")),
            world.within(mesh.get_group("copies")) if size[0] > 1 else world.alone(),
        )

    def owns(self, module: TrackedModule) -> bool:
        """Whether this worker owns a module's family."""
        return self.places[module.input] == self.place

    def place_of(self, name: str) -> int:
        """The place of the owner of a factor, or of a module's Λ, by its name."""
        return self.sum_places[name]

    def rank_of(self, module: TrackedModule, copy: int = 0) -> int:
        """The rank of a module's owner in one of the copies."""
        return copy * self.shard + self.places[module.input]
