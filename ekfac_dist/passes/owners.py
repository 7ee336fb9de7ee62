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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ekfac_dist.errors import ConfigError
from ekfac_dist.models.modules import TrackedModule, layer_name
from ekfac_dist.runtime.groups import COLLECTIVE_TIMEOUT, connect_gpus
from ekfac_dist.runtime.processes import World

# Least mean load of the owners in a window, over the load of the busiest: larger windows are shared
# out more evenly, and their rows take more memory.
_EVEN = 0.75


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
    """Input factors of neighbouring layers, as few together as can be shared out about evenly.

    Args:
        modules: The tracked modules, in the order in which they are called.
        shard: D.
    """
    members = families(modules)
    costs = {name: family_cost(family) for name, family in members.items()}
    layers = [
        list(of_layer)
        for _, of_layer in groupby(members, key=lambda name: layer_name(members[name][0].name))
    ]
    number = 0  # of windows that are large enough
    window: list[int] = []  # costs in the next one
    for layer in layers:
        window.extend(costs[name] for name in layer)
        if len(window) >= shard and sum(window) >= _EVEN * shard * max(window):
            number, window = number + 1, []
    bounds = [len(layers) * k // max(number, 1) for k in range(max(number, 1) + 1)]
    return [[name for layer in layers[i:j] for name in layer] for i, j in pairwise(bounds)]


def require_divisor(name: str, shard: int | str, workers: int) -> None:
    """Refuses a number of workers that the workers cannot be divided into.

    Args:
        name: The setting's name, for the error.
        shard: D, or "auto".
        workers: W.

    Raises:
        ConfigError: If D is above W, or does not divide it.
    """
    if shard == "auto" or workers % int(shard) == 0:
        return
    choices = ", ".join(map(str, divisors(workers)))
    fault = "which it does not divide" if int(shard) < workers else "which is less"
    raise ConfigError(
        f"{name} is {shard}, but the number of workers is {workers}, {fault}; give {choices} "
        "or auto."
    )


def divisors(workers: int) -> list[int]:
    """The numbers of workers that can share one copy of the factors, ascending."""
    return [number for number in range(1, workers + 1) if workers % number == 0]


@dataclass(frozen=True)
class Places:
    """Which of the owners of a copy owns what.

    Attributes:
        shard: D, the number of workers that share one copy of the factors.
        of_families: The place of each family's owner, by its input factor; all have place 0 if it
            is empty.
    """

    shard: int
    of_families: Mapping[str, int]

    @classmethod
    def of(cls, modules: Sequence[TrackedModule], shard: int) -> "Places":
        """Window by window, the costliest family first, each to the owner with least so far.

        Args:
            modules: All tracked modules, in model order.
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
        return cls(shard, places)

    def of_module(self, module: TrackedModule) -> int:
        """The place of a module's owner."""
        return self.of_families[module.input] if self.shard > 1 else 0

    def parts(self, group: Iterable[TrackedModule]) -> list[list[TrackedModule]]:
        """The modules of a group that each owner owns, by place."""
        parts: list[list[TrackedModule]] = [[] for _ in range(self.shard)]
        for module in group:
            parts[self.of_module(module)].append(module)
        return parts

    def windows(self, group: Sequence[TrackedModule]) -> list[list[TrackedModule]]:
        """The modules of a group whose rows are exchanged together."""
        members = families(group)
        return [
            [module for name in window for module in members[name]]
            for window in windows(group, self.shard)
        ]


NOT_SHARED = Places(1, {})


@functools.cache
def _mesh(
    device_type: str, backend: str, size: tuple[int, int], use: str, everyone: int
) -> DeviceMesh:
    """The mesh of a size, made once: its groups keep threads and sockets until the process ends.

    Args:
        device_type: Where the groups' collectives are.
        backend: Their backend.
        size: Number of copies, and of owners.
        use: What is sent: notes do not wait for rows.
        everyone: Identifies the group of all workers.
    """
    groups: Any = dist
    gloo = backend == "gloo"
    options = groups.ProcessGroupGloo._Options() if gloo else groups.ProcessGroupNCCL.Options()
    options._timeout = COLLECTIVE_TIMEOUT
    names = ("copies", "owners")
    override: Any = dict.fromkeys(names, (backend, options))
    return init_device_mesh(device_type, size, mesh_dim_names=names, backend_override=override)


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
        places = Places.of(modules, shard).of_families
        sum_places = {
            name: places[module.input]
            for module in modules
            for name in (module.name, module.input, module.output)
        }
        if shard == 1:
            return cls(shard, places, sum_places, 0, world.alone(), world.alone(), world)
        size = (world.size // shard, shard)
        everyone = id(dist.group.WORLD)
        mesh = _mesh(world.device.type, world.backend, size, "rows", everyone)
        for group in mesh.get_all_groups() if world.backend == "nccl" else ():
            connect_gpus(world.device, group, everyone)
        notes = _mesh("cpu", "gloo", size, "notes", everyone)
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
