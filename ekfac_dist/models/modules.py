"""Linear maps that factors are fitted for: what can be said of them without running a model."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ekfac_dist.errors import ModelError
from ekfac_dist.models.sharding import gathered, require_known_sharding

_READABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
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


def tensors_of(
    model: nn.Module, module: TrackedModule, numbers: Callable[[str], Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """A module's weight and bias as the model holds them, with the names of their parameters.

    Of a quantised module all that it holds: codes, and their scales.

    Args:
        model: The model.
        module: The module.
        numbers: Gives a parameter's numbers by its name; None: they are read of the model.

    Raises:
        AttributeError: The model lacks one.
    """
    if module.kind != EXPERT and is_quantised(model.get_submodule(module.name)):
        held = model.get_submodule(module.name).state_dict()
        yield from sorted((n, t.detach()) for n, t in held.items() if isinstance(t, Tensor))
        return
    for name in module.parameters:
        tensor = loaded(model, name) if numbers is None else numbers(name)
        yield name, tensor[module.fused[1]] if module.kind == EXPERT else tensor


def loaded(model: nn.Module, name: str) -> Tensor:
    """A weight's numbers, which may be sharded, or kept elsewhere until they are needed.

    Args:
        model: The model.
        name: Of a parameter or a buffer.

    Raises:
        ModelError: They are nowhere.
    """
    owner, _, kind = name.rpartition(".")
    module = model.get_submodule(owner)
    tensor = gathered(getattr(module, kind).detach())
    hook: Any = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        kept = getattr(each, "weights_map", None)
        if tensor.is_meta and kept is not None:
            tensor = kept[kind]
    if tensor.is_meta:
        raise ModelError(
            f"The weight {name} is on no device, so the model cannot be known again by it; load "
            "the whole model."
        )
    return tensor


def persistent_buffers(model: nn.Module) -> list[str]:
    """Names of the buffers that are saved with a model, in model order."""
    return [
        f"{name}.{kind}" if name else kind
        for name, module in model.named_modules()
        for kind, buffer in module._buffers.items()
        if buffer is not None and kind not in module._non_persistent_buffers_set
    ]


def quantised_weights(model: nn.Module) -> set[str]:
    """Names of the parameters and persistent buffers of linear maps that hold codes."""
    owners = {name for name, module in linear_modules(model).items() if is_quantised(module)}
    names = [*persistent_buffers(model), *(name for name, _ in model.named_parameters())]
    return {name for name in names if name.rpartition(".")[0] in owners}


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes, which is not where Accelerate may keep its weights."""
    hooks: list[Any] = [getattr(module, "_hf_hook", None) for module in model.modules()]
    for hook in hooks:
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return next(model.parameters()).device


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
    return {name: module for name, module in model.named_modules() if describe(module) is not None}


def describe(module: Any) -> tuple[str, int, int, bool] | None:
    """Kind, inputs, outputs and whether there is a bias; None of what is no linear map."""
    if isinstance(module, Conv1D):
        return CONV1D, module.nx, module.nf, module.bias is not None
    if isinstance(module, nn.Linear) or _is_opaque(module):
        bias = getattr(module, "bias", None)
        return LINEAR, module.in_features, module.out_features, isinstance(bias, Tensor)
    return None


def _is_opaque(module: Any) -> bool:
    """Whether a module is a linear map of a quantisation library's own, its weight not readable."""
    return (
        isinstance(module, nn.Module)
        and not isinstance(module, nn.Linear)
        and isinstance(getattr(module, "in_features", None), int)
        and isinstance(getattr(module, "out_features", None), int)
        and not any(module.children())
        and not isinstance(getattr(module, "weight", None), nn.Parameter)
    )


def is_quantised(module: nn.Module) -> bool:
    """Whether a linear map's weight is held in another form than a matrix of floating point."""
    weight = getattr(module, "weight", None)
    return not isinstance(weight, Tensor) or weight.dtype not in _READABLE


def require_usable(model: nn.Module) -> None:
    """Refuses weights that are sharded in an unknown way, or were packed for inference alone.

    Raises:
        ModelError: A weight is.
    """
    require_known_sharding(model)
    for name, module in linear_modules(model).items():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ModelError(
                f"The weight of {name} was packed for inference by a forward without gradients, "
                "and has none any more; load the model again."
            )


def parameter_sizes(model: nn.Module) -> dict[str, int]:
    """Numbers in each parameter, by name, in model order; a tied one has its first name.

    A linear map's weight counts as what it stands for: a quantised one is packed, or no parameter.
    """
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        described = describe(module)
        shapes = {kind: parameter.numel() for kind, parameter in own.items()}
        if described is not None:
            _, num_inputs, num_outputs, bias = described
            shapes = {"weight": num_inputs * num_outputs} | ({"bias": num_outputs} if bias else {})
        for kind, size in shapes.items():
            if kind in own and id(own[kind]) in seen:
                continue
            seen |= {id(own[kind])} if kind in own else set()
            sizes[f"{name}.{kind}" if name else kind] = size
    return sizes


def all_parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """Every name of each parameter, by its `id`; a tied one has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def only_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a linear map was called with, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor's numbers are, or would be."""
    if tensor.is_meta:
        return tensor.untyped_storage()._cdata, int(tensor.storage_offset())
    return tensor.data_ptr(), 0


def same_tensor(one: tuple[Tensor, int], other: tuple[Tensor, int]) -> bool:
    """Whether two (tensor, version) pairs are the same values in the same memory."""
    (a, a_version), (b, b_version) = one, other
    return a is b or (
        _place(a) == _place(b)
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a_version == b_version
    )
