"""The linear maps that factors are fitted for, and what is known of them without a forward."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ekfac_dist.errors import ModelError
from ekfac_dist.models.sharding import gathered, require_known_sharding

# Dtypes in which a weight's values can be read; others hold a quantisation library's codes.
_READABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LINEAR = "linear"
CONV1D = "conv1d"
EXPERT = "expert"


@dataclass(frozen=True)
class TrackedModule:
    """One linear map that factors are fitted for.

    Attributes:
        name: Its name in the model.
        kind: "linear" (weight O×I), "conv1d" (weight stored I×O), or "expert" (one expert's slice
            of a fused parameter).
        num_inputs: Input features, without the bias coordinate.
        num_outputs: O.
        bias: Whether it has a bias.
        input: Name of its input factor; modules that read the same tensor share it.
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
        """I: the size of the input factor, bias coordinate included."""
        return self.num_inputs + self.bias

    @property
    def num_parameters(self) -> int:
        """Elements of its weight and bias."""
        return self.num_outputs * self.input_size

    @property
    def fused(self) -> tuple[str, int, str]:
        """Of an expert's module: its collection's name, the expert's index, the matrix's name."""
        collection, expert, matrix = self.name.rsplit(".", 2)
        return collection, int(expert), matrix

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that are, or contain, its weight and bias."""
        if self.kind == EXPERT:
            collection, _, matrix = self.fused
            return (f"{collection}.{matrix}", f"{collection}.{matrix}_bias")[: 1 + self.bias]
        return (f"{self.name}.weight", f"{self.name}.bias")[: 1 + self.bias]

    @property
    def leads(self) -> bool:
        """Whether its input factor is named after it: it is the first that reads that tensor."""
        return self.input == f"{self.name}.input"

    def as_dict(self) -> dict[str, Any]:
        """The module's entry in a manifest."""
        return {
            "kind": self.kind,
            "in_features": self.num_inputs,
            "out_features": self.num_outputs,
            "bias": self.bias,
            "input": self.input,
            "output": self.output,
        }


def tensors_of(
    model: nn.Module, module: TrackedModule, load: Callable[[str], Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """A module's weight and bias as the model holds them, with the names of their parameters.

    For a quantised module, every tensor of its state: the codes and their scales.

    Args:
        model: The model.
        module: The module.
        load: Returns a parameter's values, given its name; None: `weight_values`.

    Raises:
        AttributeError: If the model lacks a parameter.
    """
    if module.kind != EXPERT and is_quantised(model.get_submodule(module.name)):
        state = model.get_submodule(module.name).state_dict()
        yield from sorted((n, t.detach()) for n, t in state.items() if isinstance(t, Tensor))
        return
    for name in module.parameters:
        tensor = weight_values(model, name) if load is None else load(name)
        yield name, tensor[module.fused[1]] if module.kind == EXPERT else tensor


def weight_values(model: nn.Module, name: str) -> Tensor:
    """A weight's values, gathered if they are sharded, fetched if they are offloaded.

    Args:
        model: The model.
        name: Name of a parameter or a buffer.

    Raises:
        ModelError: If no device holds the values.
    """
    owner, _, kind = name.rpartition(".")
    module = model.get_submodule(owner)
    tensor = gathered(getattr(module, kind).detach())
    hook: Any = getattr(module, "_hf_hook", None)
    for inner_hook in getattr(hook, "hooks", (hook,)):
        offloaded = getattr(inner_hook, "weights_map", None)
        if tensor.is_meta and offloaded is not None:
            tensor = offloaded[kind]
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
    """Names of the parameters and persistent buffers of quantised linear maps."""
    owners = {name for name, module in linear_modules(model).items() if is_quantised(module)}
    names = [*persistent_buffers(model), *(name for name, _ in model.named_parameters())]
    return {name for name in names if name.rpartition(".")[0] in owners}


def device_of(model: nn.Module) -> torch.device:
    """The device on which a model computes; Accelerate may keep its weights on another."""
    hooks: list[Any] = [getattr(module, "_hf_hook", None) for module in model.modules()]
    for hook in hooks:
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return next(model.parameters()).device


def layer_name(module: str) -> str:
    """The layer of a module: the module's name up to its first integer, or the whole name."""
    parts = module.split(".")
    end = next((k for k, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: end + 1])


def factor_sizes(modules: Iterable[TrackedModule]) -> dict[str, int]:
    """Size n of every factor of the modules, by name, in model order."""
    sizes: dict[str, int] = {}
    for module in modules:
        sizes[module.input] = module.input_size
        sizes[module.output] = module.num_outputs
    return sizes


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear map of a model, by name, in model order."""
    return {name: module for name, module in model.named_modules() if describe(module) is not None}


def describe(module: Any) -> tuple[str, int, int, bool] | None:
    """Kind, input features, output features, and whether there is a bias, of a linear map.

    None if the module is no linear map.
    """
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return CONV1D, module.nx, module.nf, module.bias is not None
    if isinstance(module, nn.Linear) or _is_opaque(module):
        bias = getattr(module, "bias", None)
        return LINEAR, module.in_features, module.out_features, isinstance(bias, Tensor)
    return None


def _is_opaque(module: Any) -> bool:
    """Whether a module is a quantisation library's own linear map, with an unreadable weight."""
    return (
        isinstance(module, nn.Module)
        and not isinstance(module, nn.Linear)
        and isinstance(getattr(module, "in_features", None), int)
        and isinstance(getattr(module, "out_features", None), int)
        and not any(module.children())
        and not isinstance(getattr(module, "weight", None), nn.Parameter)
    )


def is_quantised(module: nn.Module) -> bool:
    """Whether a linear map's weight is anything but a matrix in floating point."""
    weight = getattr(module, "weight", None)
    return not isinstance(weight, Tensor) or weight.dtype not in _READABLE


def require_usable(model: nn.Module) -> None:
    """Refuses weights that are sharded in an unknown way, or packed for inference only.

    Raises:
        ModelError: If there is such a weight.
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
    """Elements of each parameter, by name, in model order; a tied one only under its first name.

    A linear map counts with its full weight matrix, even where a quantised weight is packed or no
    parameter at all.
    """
    sizes: dict[str, int] = {}
    counted: set[int] = set()
    for name, module in model.named_modules():
        own_parameters = dict(module.named_parameters(recurse=False))
        linear_map = describe(module)
        own_sizes = {kind: parameter.numel() for kind, parameter in own_parameters.items()}
        if linear_map is not None:
            _, num_inputs, num_outputs, bias = linear_map
            own_sizes = {"weight": num_inputs * num_outputs} | (
                {"bias": num_outputs} if bias else {}
            )
        for kind, size in own_sizes.items():
            if kind in own_parameters and id(own_parameters[kind]) in counted:
                continue
            counted |= {id(own_parameters[kind])} if kind in own_parameters else set()
            sizes[f"{name}.{kind}" if name else kind] = size
    return sizes


def all_parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """Every name of each parameter, by its `id`; a tied parameter has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def only_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a linear map, from its positional or keyword arguments."""
    return args[0] if args else next(iter(kwargs.values()))


def _memory_address(tensor: Tensor) -> tuple[int, int]:
    """Address of a tensor's elements; on the meta device, of its storage, and the offset in it."""
    if tensor.is_meta:
        return tensor.untyped_storage()._cdata, int(tensor.storage_offset())
    return tensor.data_ptr(), 0


def same_tensor(first: tuple[Tensor, int], second: tuple[Tensor, int]) -> bool:
    """Whether two (tensor, version) pairs hold the same values in the same memory."""
    (a, a_version), (b, b_version) = first, second
    return a is b or (
        _memory_address(a) == _memory_address(b)
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a_version == b_version
    )
