"""Which parts of a transformer are its MLPs: what its layers have beside attention, norms, routers.

A layer is an element of a list of modules in which attention, or another mixing of positions,
happens. Attention is told by its name, or by what a traced forward showed: a module that mixes
positions is attention, recurrence or convolution, with all that is in it, unless it bears the name
of an MLP. No model's class is looked at.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import nn

from ekfac_dist.models.modules import describe

# Parts of a name, in lower case.
_ATTENTION = re.compile(r"att(n|en)")
_NORM = re.compile(r"norm|(^|_)ln(_|$|\d)")
_ROUTER = re.compile(r"router|^switch$|switch_?gate")
_GATE = re.compile(r"gate$|^wg$")
_CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d)
_MLP = re.compile(r"mlp|^ffn?s?$|feed_?forward")

PART_OF_NORM = "part of a norm"


@dataclass(frozen=True)
class Place:
    """Where something of a model stands.

    Attributes:
        layer: The layer that it is in; "" if in none.
        block: The part of the layer that it is in: the layer's child, or the layer itself.
        outside: Why it is not in an MLP; "" if it is.
    """

    layer: str
    block: str
    outside: str = ""


class Anatomy:
    """Where a model's layers are, and what in them is no MLP.

    Args:
        model: The model.
        mixing: Modules that mix positions, as traced; none of them where nothing was traced.
        pointwise: Modules that were seen not to: none of them is attention, whatever its name.
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
        """Where a module stands, by its name, or by a parameter's."""
        layer = next((found for found in map(self._layer_in, _prefixes(name)) if found), "")
        if not layer:
            return Place("", "", "outside of the layers")
        inner = name[len(layer) + 1 :].split(".")
        block = f"{layer}.{inner[0]}" if len(inner) > 1 else layer
        parts = [part.lower() for part in name.split(".")]
        named = next((k for k, part in enumerate(parts) if _ATTENTION.search(part)), None)
        if named is not None and ".".join(name.split(".")[: named + 1]) not in self._pointwise:
            return Place(layer, block, "attention")
        if any(_NORM.search(part) for part in parts[layer.count(".") + 1 :]):
            return Place(layer, block, PART_OF_NORM)
        if not any(_MLP.search(part) for part in parts):
            mixes = next((m for m in self._mixing if f"{name}.".startswith(f"{m}.")), None)
            if mixes is not None:
                return Place(layer, block, "mixes positions")
        return Place(layer, block)

    def is_router(self, name: str, num_outputs: int) -> bool:
        """Whether a linear map of an MLP chooses or weighs experts, by its name and its size."""
        parts = [part.lower() for part in name.split(".")]
        if any(_ROUTER.search(part) for part in parts):
            return True
        if self._routers.intersection(_prefixes(name)):
            return True
        return num_outputs in self._num_experts and any(_GATE.search(part) for part in parts)

    def _gates_of_several_parts(self, model: nn.Module) -> set[str]:
        """Gates that are no linear map themselves, and have one in them that chooses experts."""
        found = set()
        for name, module in model.named_modules():
            described = describe(module)
            if described is None or not self.is_router(name, described[2]):
                continue
            outer = _prefixes(name)[:-1]
            found |= {gate for gate in outer if _GATE.search(gate.rpartition(".")[2].lower())}
        return found

    def is_mlp(self, name: str, module: nn.Module) -> bool:
        """Whether a linear map is one of an MLP's."""
        described = describe(module)
        assert described is not None
        return not self.place(name).outside and not self.is_router(name, described[2])

    def _layer_in(self, prefix: str) -> str:
        return prefix if prefix.rpartition(".")[0] in self._lists else ""


def _prefixes(name: str) -> list[str]:
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
    found: dict[str, int] = {}
    for name, length in lists.items():
        outermost = not any(name.startswith(f"{other}.") for other in found)
        mixes = any(m.startswith(f"{name}.") for m in mixing)
        if outermost and mixes:
            found[name] = length
    # As many feed-forwards as attentions, in a list beside theirs.
    siblings = {(name.rpartition(".")[0], length) for name, length in found.items()}
    beside = {n for n, length in lists.items() if (n.rpartition(".")[0], length) in siblings}
    return set(found) | beside


def _named_attention(model: nn.Module) -> list[str]:
    return [
        name
        for name, _ in model.named_modules()
        if _ATTENTION.search(name.rpartition(".")[2].lower())
    ]


def _numbers_of_experts(model: nn.Module) -> set[int]:
    """How many experts there may be, and 1: the outputs that a gate of experts may have."""
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
