"""Which parts of a transformer are its MLPs.

A layer is an element of a list of modules that contains attention, or another mixing of positions.
The MLPs are the rest of a layer: without attention, norms and routers. Attention is recognised by
its name, or by a traced forward: a module that mixes positions is attention, recurrence or
convolution, with everything in it, unless its name is an MLP's. No model's class is consulted.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import nn

from ekfac_dist.models.modules import describe

# Patterns in a part of a module's name, in lower case.
_ATTENTION = re.compile(r"att(n|en)")
_NORM = re.compile(r"norm|(^|_)ln(_|$|\d)")
_ROUTER = re.compile(r"router|^switch$|switch_?gate")
_GATE = re.compile(r"gate$|^wg$")
_CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d)
_MLP = re.compile(r"mlp|^ffn?s?$|feed_?forward")

PART_OF_NORM = "part of a norm"


@dataclass(frozen=True)
class Place:
    """Where in a model a module or parameter is.

    Attributes:
        layer: Name of its layer; "" if it is in none.
        block: Name of the layer's child that it is in, or of the layer itself.
        outside: Why it is not in an MLP; "" if it is.
    """

    layer: str
    block: str
    outside: str = ""


class Anatomy:
    """A model's layers, and their parts that are no MLPs.

    Args:
        model: The model.
        mixing: Names of modules that mix positions, from a trace; empty without a trace.
        pointwise: Names of modules that do not, from a trace; they are no attention, whatever
            their names.
    """

    def __init__(
        self, model: nn.Module, mixing: Collection[str] = (), pointwise: Collection[str] = ()
    ) -> None:
        self._mixing = mixing
        self._pointwise = pointwise
        self._lists = _layer_lists(model, mixing)
        self._num_experts = _numbers_of_experts(model)
        self._routers: set[str] = set()
        self._routers = self._gates_of_several_parts(model)

    def place(self, name: str) -> Place:
        """The place of a module or a parameter, given its name."""
        layer = next(
            (candidate for candidate in map(self._layer_in, _prefixes(name)) if candidate), ""
        )
        if not layer:
            return Place("", "", "outside of the layers")
        inner_parts = name[len(layer) + 1 :].split(".")
        block = f"{layer}.{inner_parts[0]}" if len(inner_parts) > 1 else layer
        parts = [part.lower() for part in name.split(".")]
        depth = next((k for k, part in enumerate(parts) if _ATTENTION.search(part)), None)
        if depth is not None and ".".join(name.split(".")[: depth + 1]) not in self._pointwise:
            return Place(layer, block, "attention")
        if any(_NORM.search(part) for part in parts[layer.count(".") + 1 :]):
            return Place(layer, block, PART_OF_NORM)
        mixes = any(f"{name}.".startswith(f"{module}.") for module in self._mixing)
        if mixes and not any(_MLP.search(part) for part in parts):
            return Place(layer, block, "mixes positions")
        return Place(layer, block)

    def is_router(self, name: str, num_outputs: int) -> bool:
        """Whether a linear map selects or weights experts, by its name and its size.

        Args:
            name: The linear map's name.
            num_outputs: O.
        """
        parts = [part.lower() for part in name.split(".")]
        if any(_ROUTER.search(part) for part in parts):
            return True
        if self._routers.intersection(_prefixes(name)):
            return True
        return num_outputs in self._num_experts and any(_GATE.search(part) for part in parts)

    def _gates_of_several_parts(self, model: nn.Module) -> set[str]:
        """Gates that are no linear map, but contain one that selects experts."""
        gates = set()
        for name, module in model.named_modules():
            linear_map = describe(module)
            if linear_map is None or not self.is_router(name, linear_map[2]):
                continue
            containers = _prefixes(name)[:-1]
            gates |= {gate for gate in containers if _GATE.search(gate.rpartition(".")[2].lower())}
        return gates

    def is_mlp(self, name: str, module: nn.Module) -> bool:
        """Whether a linear map belongs to an MLP."""
        linear_map = describe(module)
        assert linear_map is not None
        return not self.place(name).outside and not self.is_router(name, linear_map[2])

    def _layer_in(self, prefix: str) -> str:
        """The prefix if it is a layer's name; otherwise ""."""
        return prefix if prefix.rpartition(".")[0] in self._lists else ""


def _prefixes(name: str) -> list[str]:
    """Names of all modules that contain a module, and its own, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:k]) for k in range(1, len(parts) + 1)]


def _layer_lists(model: nn.Module, mixing: Iterable[str]) -> set[str]:
    """Names of the lists of modules whose elements are layers."""
    lists = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    }
    mixing = [*mixing, *_named_attention(model)]
    layer_lists: dict[str, int] = {}
    for name, length in lists.items():
        outermost = not any(name.startswith(f"{other}.") for other in layer_lists)
        mixes_inside = any(module.startswith(f"{name}.") for module in mixing)
        if outermost and mixes_inside:
            layer_lists[name] = length
    # Feed-forwards may be in a list of the same length beside that of the attentions.
    siblings = {(name.rpartition(".")[0], length) for name, length in layer_lists.items()}
    parallel_lists = {
        name for name, length in lists.items() if (name.rpartition(".")[0], length) in siblings
    }
    return set(layer_lists) | parallel_lists


def _named_attention(model: nn.Module) -> list[str]:
    """Names of the modules that are attention by their name."""
    return [
        name
        for name, _ in model.named_modules()
        if _ATTENTION.search(name.rpartition(".")[2].lower())
    ]


def _numbers_of_experts(model: nn.Module) -> set[int]:
    """Possible numbers of experts, and 1: the outputs that a gate of experts may have."""
    fused = {
        parameter.shape[0]
        for module in model.modules()
        if not isinstance(module, _CONVOLUTIONS)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim == 3
    }
    listed = {
        len(module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and name.endswith("experts")
    }
    return {1} | fused | listed
