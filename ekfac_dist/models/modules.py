"""Linear maps that factors are fitted for: what can be said of them without running a model."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LINEAR = "linear"
CONV1D = "conv1d"
EXPERT = "expert"


@dataclass(frozen=True)
class TrackedModule:
    """One linear map that factors are fitted for.

    Attributes:
        name: Its name in the model.
        kind: "linear" (weight O×I), "conv1d" (weight stored I×O), or "expert" (one expert's part of
            a fused parameter).
        num_inputs: Features that it reads, without the bias coordinate.
        num_outputs: O.
        bias: Whether it has a bias.
        input: Name of its input factor; modules that read one tensor share it.
        output: Name of its output factor.
    """

    name: str
    kind: str
    num_inputs: int
    num_outputs: int
    bias: bool
    input: str
    output: str

    @property
    def input_size(self) -> int:
        """I: size of the input factor, the bias coordinate included."""
        return self.num_inputs + self.bias

    @property
    def num_parameters(self) -> int:
        """Numbers in its weight and bias."""
        return self.num_outputs * self.input_size

    @property
    def fused(self) -> tuple[str, int, str]:
        """Of an expert's module: the collection's name, the expert, and the matrix's name."""
        collection, expert, matrix = self.name.rsplit(".", 2)
        return collection, int(expert), matrix

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that its weight and bias are, or are parts of."""
        if self.kind == EXPERT:
            collection, _, matrix = self.fused
            return (f"{collection}.{matrix}", f"{collection}.{matrix}_bias")[: 1 + self.bias]
        return (f"{self.name}.weight", f"{self.name}.bias")[: 1 + self.bias]

    @property
    def leads(self) -> bool:
        """Whether its input factor bears its name: it is the first that reads that tensor."""
        return self.input == f"{self.name}.input"

    def as_dict(self) -> dict[str, Any]:
        """Its entry in a manifest."""
        return {
            "kind": self.kind,
            "in_features": self.num_inputs,
            "out_features": self.num_outputs,
            "bias": self.bias,
            "input": self.input,
            "output": self.output,
        }


def tensors_of(model: nn.Module, module: TrackedModule) -> Iterator[tuple[str, Tensor]]:
    """A module's weight and bias as the model holds them, with the names of their parameters.

    Raises:
        AttributeError: The model lacks one.
    """
    for name in module.parameters:
        tensor = model.get_parameter(name).detach()
        yield name, tensor[module.fused[1]] if module.kind == EXPERT else tensor


def layer_name(module: str) -> str:
    """The layer that a module belongs to: its name up to the first number, or the whole of it."""
    parts = module.split(".")
    number = next((k for k, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: number + 1])


def factor_sizes(modules: Iterable[TrackedModule]) -> dict[str, int]:
    """Size n of every factor of some modules, by name, in model order."""
    sizes: dict[str, int] = {}
    for module in modules:
        sizes[module.input] = module.input_size
        sizes[module.output] = module.num_outputs
    return sizes


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear map of a model, by name, in model order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


def describe(module: Any) -> tuple[str, int, int, bool] | None:
    """Kind, inputs, outputs and whether there is a bias; None of what is no linear map."""
    if isinstance(module, Conv1D):
        return CONV1D, module.nx, module.nf, module.bias is not None
    if isinstance(module, nn.Linear):
        return LINEAR, module.in_features, module.out_features, module.bias is not None
    return None


def all_parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """Every name of each parameter, by its `id`; a tied one has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def only_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a linear map was called with, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def same_tensor(one: tuple[Tensor, int], other: tuple[Tensor, int]) -> bool:
    """Whether two (tensor, version) pairs are the same values in the same memory."""
    (a, a_version), (b, b_version) = one, other
    return a is b or (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a_version == b_version
    )
