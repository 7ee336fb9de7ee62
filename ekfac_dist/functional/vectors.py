"""Vectors in the space of the parameters: flat, stacked, or one tensor for each parameter.

However a vector comes, it is read as {parameter's name: tensor [..., *shape]}, solved module by
module, and given back as it came.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ekfac_dist.errors import ConfigError, NonFiniteError
from ekfac_dist.functional.recording import lives_in_a_transform
from ekfac_dist.models.modules import CONV1D, TrackedModule

Solve = Callable[[TrackedModule, Tensor], Tensor]


@dataclass(frozen=True)
class Slot:
    """What one tensor of a list stands for: a parameter, or a module's weight and bias together.

    Attributes:
        names: The parameter's name, or those of a weight and its bias.
        shape: Shape of the tensor's last dimensions.
        module: The module whose weight and bias they are.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    module: TrackedModule | None = None

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor ends in the slot's shape."""
        return _ends_in(tensor, self.shape)

    def parted(self, tensor: Tensor) -> dict[str, Tensor]:
        """The parameters that a tensor holds."""
        if self.module is None:
            return {self.names[0]: tensor}
        return part(self.module, tensor)

    def joined(self, named: Mapping[str, Tensor]) -> Tensor:
        """The tensor that holds the parameters."""
        if self.module is None:
            return named[self.names[0]]
        return join(self.module, named)


@dataclass(frozen=True)
class Layout:
    """The parameters in their order, and which of them belong to modules that have factors.

    Attributes:
        shapes: Shape of every parameter, by name.
        modules: The modules with factors, in the order of their weights.
    """

    shapes: Mapping[str, torch.Size]
    modules: tuple[TrackedModule, ...]

    def solve(self, v: Any, solve: Solve) -> tuple[Any, list[str]]:
        """Applies a function to each module's part of a vector.

        Args:
            v: The vector: flat [..., P]; a list of tensors, one for each parameter, or one for each
                recorded parameter; or a mapping of them by name. A weight may have its bias as its
                last column, [..., O, I]. Leading dimensions stack several vectors.
            solve: From a module and its part [..., O, I], the bias last, to another such.

        Returns:
            The result, in v's structure, and the names of the parameters in it that no module with
            factors has, where it is zero.

        Raises:
            ConfigError: It is no such vector.
            NonFiniteError: It holds NaN or infinity.
        """
        if isinstance(v, Tensor):
            solved, zeros = self._solve(self._split(v), solve)
            parts = [solved[n].reshape(*v.shape[:-1], s.numel()) for n, s in self.shapes.items()]
            return torch.cat(parts, -1), zeros
        if isinstance(v, Mapping):
            self._require_names(v)
            return self._solve(v, solve)
        if not isinstance(v, Sequence) or isinstance(v, str):
            raise ConfigError(
                f"v is a {type(v).__name__}; give a flat tensor, a list of weight-shaped tensors, "
                "or a mapping of them by name."
            )
        slots = self._slots(v)
        named: dict[str, Tensor] = {}
        for slot, tensor in zip(slots, v, strict=True):
            named |= slot.parted(tensor)
        solved, zeros = self._solve(named, solve)
        joined = [slot.joined(solved) for slot in slots]
        return (tuple(joined) if isinstance(v, tuple) else joined), zeros

    def _solve(
        self, named: Mapping[str, Tensor], solve: Solve
    ) -> tuple[dict[str, Tensor], list[str]]:
        leads = {
            name: list(tensor.shape[: tensor.ndim - len(self.shapes[name])])
            for name, tensor in named.items()
        }
        first = next(iter(leads))
        other = next((name for name in leads if leads[name] != leads[first]), None)
        if other is not None:
            raise ConfigError(
                f"v stacks {leads[first]} vectors in {first} and {leads[other]} in {other}; all "
                "its tensors must have the same leading dimensions."
            )
        owners = {name: module for module in self.modules for name in module.parameters}
        solved: dict[str, Tensor] = {}
        zeros = []
        for name, tensor in named.items():
            if name in solved:
                continue
            if name in owners:
                for own in owners[name].parameters:
                    _require_finite(own, named[own])
                solved |= part(owners[name], solve(owners[name], join(owners[name], named)))
            else:
                solved[name] = torch.zeros_like(tensor)
                zeros.append(name)
        return {name: solved[name] for name in named}, zeros

    def _split(self, flat: Tensor) -> dict[str, Tensor]:
        sizes = [shape.numel() for shape in self.shapes.values()]
        if not flat.ndim or flat.shape[-1] != sum(sizes) or not flat.is_floating_point():
            raise ConfigError(
                f"v has shape {list(flat.shape)} and dtype {_called(flat.dtype)}; a flat vector "
                f"has length {sum(sizes)}, one number for each parameter ({self._first_names()}), "
                f"and a stack of them has shape [number, {sum(sizes)}]."
            )
        return {
            name: piece.reshape(*flat.shape[:-1], *shape)
            for (name, shape), piece in zip(self.shapes.items(), flat.split(sizes, -1), strict=True)
        }

    def _require_names(self, v: Mapping[str, Any]) -> None:
        unknown = next((name for name in v if name not in self.shapes), None)
        if unknown is not None or not v:
            raise ConfigError(
                f"v has {'no tensors' if not v else f'a tensor for {unknown!r}'}; its names must "
                f"be parameters' names: {self._first_names()}."
            )
        for name, tensor in v.items():
            if not (isinstance(tensor, Tensor) and _ends_in(tensor, self.shapes[name])):
                raise ConfigError(
                    f"v's {name} is {_described(tensor)}; it must be a tensor of shape "
                    f"{list(self.shapes[name])}, or a stack of them."
                )
        for module in self.modules:
            names = module.parameters
            missing = [name for name in names if name not in v]
            if missing and len(missing) < len(names):
                raise ConfigError(
                    f"v has a tensor for {next(n for n in names if n in v)} and none for "
                    f"{missing[0]}; a weight and its bias are solved for together."
                )

    def _slots(self, v: Sequence[Any]) -> list[Slot]:
        """What each tensor of a list stands for: all parameters, or the recorded ones alone."""
        recorded = [name for module in self.modules for name in module.parameters]
        for names in (list(self.shapes), recorded):
            slots = self._match(v, names)
            if slots is not None:
                return slots
        wanted = ", ".join(f"{name} {list(self.shapes[name])}" for name in recorded)
        more = "" if len(recorded) == len(self.shapes) else ", or one for every parameter"
        raise ConfigError(
            f"v is a list of {len(v)}: {', '.join(map(_described, v)) or 'nothing'}. It must have, "
            f"in this order, a tensor for each of {wanted} (a bias beside its weight, or as the "
            f"last column of one tensor, outputs × inputs + 1){more}; or stacks of them."
        )

    def _match(self, v: Sequence[Any], names: Sequence[str]) -> list[Slot] | None:
        merged = {
            f"{m.name}.weight": Slot(m.parameters, (m.num_outputs, m.input_size), m)
            for m in self.modules
            if m.bias
        }
        slots: list[Slot] = []
        done: set[str] = set()
        for name in names:
            if name in done:
                continue
            if len(slots) == len(v):
                return None
            tensor = v[len(slots)]
            choices = [Slot((name,), tuple(self.shapes[name]))]
            choices += [merged[name]] if name in merged else []
            slot = next((s for s in choices if isinstance(tensor, Tensor) and s.fits(tensor)), None)
            if slot is None:
                return None
            slots.append(slot)
            done.update(slot.names)
        return slots if len(slots) == len(v) else None

    def _first_names(self) -> str:
        names = list(self.shapes)
        return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def join(module: TrackedModule, named: Mapping[str, Tensor]) -> Tensor:
    """A module's weight [..., O, I], with its bias as the last column, from its parameters."""
    names = module.parameters
    weight = named[names[0]]
    if module.kind == CONV1D:
        weight = weight.mT
    return torch.cat([weight, named[names[1]].unsqueeze(-1)], -1) if module.bias else weight


def part(module: TrackedModule, matrix_OI: Tensor) -> dict[str, Tensor]:
    """A module's parameters, as they are shaped, from a weight with its bias as the last column."""
    names = module.parameters
    weight = matrix_OI[..., : module.num_inputs]
    if module.kind == CONV1D:
        weight = weight.mT
    parts = {names[0]: weight}
    if module.bias:
        parts[names[1]] = matrix_OI[..., -1]
    return parts


def _require_finite(name: str, tensor: Tensor) -> None:
    if not lives_in_a_transform(tensor) and not tensor.isfinite().all():
        raise NonFiniteError(f"v holds NaN or infinity in its part for {name}.")


def _ends_in(tensor: Tensor, shape: Sequence[int]) -> bool:
    lead = tensor.ndim - len(shape)
    return lead >= 0 and tensor.shape[lead:] == tuple(shape) and tensor.is_floating_point()


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _described(value: Any) -> str:
    if value is None:
        return "None (no gradient?)"
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"
