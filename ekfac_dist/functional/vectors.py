"""Vectors in the space of the parameters: flat, stacked, or one tensor for each parameter.

A vector of any of these forms is converted to {parameter's name: tensor [..., *shape]}, solved
module by module, and converted back to its form.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ekfac_dist.errors import ConfigError, NonFiniteError
from ekfac_dist.functional.recording import is_in_transform
from ekfac_dist.models.modules import CONV1D, TrackedModule

# Maps a module and its part of a vector [..., O, I], the bias last, to another such part.
Solve = Callable[[TrackedModule, Tensor], Tensor]


@dataclass(frozen=True)
class Slot:
    """What one tensor of a list holds: a parameter, or a module's weight and bias together.

    Attributes:
        names: Name of the parameter, or of a weight and its bias.
        shape: Shape of the tensor's last dimensions.
        module: The module of the weight and bias; None for a single parameter.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    module: TrackedModule | None = None

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor's last dimensions have the slot's shape."""
        return _ends_in(tensor, self.shape)

    def parameters_of(self, tensor: Tensor) -> dict[str, Tensor]:
        """The slot's parameters, by name, from its tensor."""
        if self.module is None:
            return {self.names[0]: tensor}
        return split_weight_and_bias(self.module, tensor)

    def tensor_of(self, named: Mapping[str, Tensor]) -> Tensor:
        """The slot's tensor, from parameters by name."""
        if self.module is None:
            return named[self.names[0]]
        return join_weight_and_bias(self.module, named)


@dataclass(frozen=True)
class Layout:
    """The order and shapes of all parameters, and the modules that have factors.

    Attributes:
        shapes: Shape of every parameter, by name, in the model's order.
        modules: The modules that have factors, in the order of their weights.
    """

    shapes: Mapping[str, torch.Size]
    modules: tuple[TrackedModule, ...]

    def solve(self, v: Any, solve: Solve) -> tuple[Any, list[str]]:
        """Applies a function to each module's part of a vector.

        Args:
            v: The vector: flat [..., P]; a list of tensors, one for each parameter, or one for each
                recorded parameter; or a mapping of them by name. In a list, a weight and its bias
                may be one tensor [..., O, I] with the bias in the last column. Leading dimensions
                stack several vectors.
            solve: The function.

        Returns:
            The result in v's structure, and the names of v's parameters that belong to no module
            with factors, for which the result is zero.

        Raises:
            ConfigError: If v has none of these forms.
            NonFiniteError: If v holds NaN or infinity in a module's part.
        """
        if isinstance(v, Tensor):
            solved, zeros = self._solve_named(self._split_flat(v), solve)
            parts = [
                solved[name].reshape(*v.shape[:-1], shape.numel())
                for name, shape in self.shapes.items()
            ]
            return torch.cat(parts, -1), zeros
        if isinstance(v, Mapping):
            self._require_names(v)
            return self._solve_named(v, solve)
        if not isinstance(v, Sequence) or isinstance(v, str):
            raise ConfigError(
                f"v is a {type(v).__name__}; give a flat tensor, a list of weight-shaped tensors, "
                "or a mapping of them by name."
            )
        slots = self._slots(v)
        named: dict[str, Tensor] = {}
        for slot, tensor in zip(slots, v, strict=True):
            named |= slot.parameters_of(tensor)
        solved, zeros = self._solve_named(named, solve)
        joined = [slot.tensor_of(solved) for slot in slots]
        return (tuple(joined) if isinstance(v, tuple) else joined), zeros

    def _solve_named(
        self, named: Mapping[str, Tensor], solve: Solve
    ) -> tuple[dict[str, Tensor], list[str]]:
        """As `solve`, for a mapping of tensors by parameter name."""
        stacks = {
            name: list(tensor.shape[: tensor.ndim - len(self.shapes[name])])
            for name, tensor in named.items()
        }
        first = next(iter(stacks))
        other = next((name for name in stacks if stacks[name] != stacks[first]), None)
        if other is not None:
            raise ConfigError(
                f"v stacks {stacks[first]} vectors in {first} and {stacks[other]} in {other}; all "
                "its tensors must have the same leading dimensions."
            )
        owners = {name: module for module in self.modules for name in module.parameters}
        solved: dict[str, Tensor] = {}
        zeros = []
        for name, tensor in named.items():
            if name in solved:
                continue
            if name in owners:
                module = owners[name]
                for own_name in module.parameters:
                    _require_finite_part(own_name, named[own_name])
                solved_OI = solve(module, join_weight_and_bias(module, named))
                solved |= split_weight_and_bias(module, solved_OI)
            else:
                solved[name] = torch.zeros_like(tensor)
                zeros.append(name)
        return {name: solved[name] for name in named}, zeros

    def _split_flat(self, flat: Tensor) -> dict[str, Tensor]:
        sizes = [shape.numel() for shape in self.shapes.values()]
        if not flat.ndim or flat.shape[-1] != sum(sizes) or not flat.is_floating_point():
            raise ConfigError(
                f"v has shape {list(flat.shape)} and dtype {_dtype_name(flat.dtype)}; a flat "
                f"vector has length {sum(sizes)}, one number for each parameter "
                f"({self._first_names()}), and a stack of them has shape [number, {sum(sizes)}]."
            )
        return {
            name: part.reshape(*flat.shape[:-1], *shape)
            for (name, shape), part in zip(self.shapes.items(), flat.split(sizes, -1), strict=True)
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
        """The slot of each tensor of a list, which has all parameters or only the recorded ones."""
        recorded = [name for module in self.modules for name in module.parameters]
        for names in (list(self.shapes), recorded):
            slots = self._matching_slots(v, names)
            if slots is not None:
                return slots
        expected = ", ".join(f"{name} {list(self.shapes[name])}" for name in recorded)
        more = "" if len(recorded) == len(self.shapes) else ", or one for every parameter"
        raise ConfigError(
            f"v is a list of {len(v)}: {', '.join(map(_described, v)) or 'nothing'}. It must have, "
            f"in this order, a tensor for each of {expected} (a bias beside its weight, or as the "
            f"last column of one tensor, outputs × inputs + 1){more}; or stacks of them."
        )

    def _matching_slots(self, v: Sequence[Any], names: Sequence[str]) -> list[Slot] | None:
        """Slots for parameters in this order that fit the tensors; None if there are none.

        A weight with a bias takes one tensor or two, whichever fits.
        """
        with_bias = {
            f"{module.name}.weight": Slot(
                module.parameters, (module.num_outputs, module.input_size), module
            )
            for module in self.modules
            if module.bias
        }
        slots: list[Slot] = []
        matched: set[str] = set()
        for name in names:
            if name in matched:
                continue
            if len(slots) == len(v):
                return None
            tensor = v[len(slots)]
            choices = [Slot((name,), tuple(self.shapes[name]))]
            choices += [with_bias[name]] if name in with_bias else []
            slot = next((s for s in choices if isinstance(tensor, Tensor) and s.fits(tensor)), None)
            if slot is None:
                return None
            slots.append(slot)
            matched.update(slot.names)
        return slots if len(slots) == len(v) else None

    def _first_names(self) -> str:
        names = list(self.shapes)
        return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def join_weight_and_bias(module: TrackedModule, named: Mapping[str, Tensor]) -> Tensor:
    """A module's weight with its bias as the last column [..., O, I], from its parameters."""
    names = module.parameters
    weight = named[names[0]]
    if module.kind == CONV1D:
        weight = weight.mT
    return torch.cat([weight, named[names[1]].unsqueeze(-1)], -1) if module.bias else weight


def split_weight_and_bias(module: TrackedModule, matrix_OI: Tensor) -> dict[str, Tensor]:
    """A module's parameters in their own shapes, from its weight with the bias as last column."""
    names = module.parameters
    weight = matrix_OI[..., : module.num_inputs]
    if module.kind == CONV1D:
        weight = weight.mT
    parameters = {names[0]: weight}
    if module.bias:
        parameters[names[1]] = matrix_OI[..., -1]
    return parameters


def _require_finite_part(name: str, tensor: Tensor) -> None:
    if not is_in_transform(tensor) and not tensor.isfinite().all():
        raise NonFiniteError(f"v holds NaN or infinity in its part for {name}.")


def _ends_in(tensor: Tensor, shape: Sequence[int]) -> bool:
    num_leading = tensor.ndim - len(shape)
    ends_so = num_leading >= 0 and tensor.shape[num_leading:] == tuple(shape)
    return ends_so and tensor.is_floating_point()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _described(value: Any) -> str:
    if value is None:
        return "None (no gradient?)"
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"
