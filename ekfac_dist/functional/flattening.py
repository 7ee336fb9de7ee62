"""A model's parameters as one flat vector, and functions that take them so."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ekfac_dist.errors import ConfigError


@dataclass(frozen=True)
class Flattened:
    """What `flatten_func` attaches to a decorated function, as its attribute `flattened`.

    Attributes:
        model: The model whose parameters are flattened.
        param_num: Index of the positional argument that holds them.
    """

    model: nn.Module
    param_num: int


def flatten_params(params: Mapping[str, Tensor] | nn.Module | Iterable[Tensor]) -> Tensor:
    """Concatenates parameters into one vector, in their order.

    Args:
        params: A mapping by name such as `dict(model.named_parameters())`, an iterable of tensors,
            or the model.

    Returns:
        Vector [P], P being the parameters' number of elements; gradients flow through it.

    Raises:
        ConfigError: If there are none, or one is no tensor.
    """
    if isinstance(params, nn.Module):
        params = list(params.parameters())
    elif isinstance(params, Mapping):
        params = list(params.values())
    elif isinstance(params, Tensor):
        params = [params]
    else:
        params = list(params)
    if not params or not all(isinstance(tensor, Tensor) for tensor in params):
        kinds = sorted({type(tensor).__name__ for tensor in params})
        raise ConfigError(
            f"The parameters to flatten are {', '.join(kinds) or 'none'}; give tensors, by name or "
            "in a list, such as dict(model.named_parameters())."
        )
    return torch.cat([tensor.reshape(-1) for tensor in params])


def flatten_func(
    model: nn.Module, param_num: int = 0
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a function of a model's named parameters, so that it takes them as a flat vector.

    The function itself receives {name: tensor}, as `torch.func.functional_call` expects. Transforms
    of `torch.func` can be applied to the decorated function.

    Args:
        model: The model; only its parameters' names, shapes and order matter.
        param_num: Index of the positional argument that holds the parameters.

    Raises:
        ConfigError: If `model` is no module or `param_num` no whole number of 0 or more; when the
            function is called, if the argument is missing or of another shape.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"The model of flatten_func is a {type(model).__name__}; give a module.")
    if not isinstance(param_num, int) or isinstance(param_num, bool) or param_num < 0:
        raise ConfigError(f"param_num is {param_num!r}; it must be a whole number of 0 or more.")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def flattened(*args: Any, **kwargs: Any) -> Any:
            if len(args) <= param_num:
                raise ConfigError(
                    f"The function was called with {len(args)} positional arguments; argument "
                    f"{param_num} has to be the flat parameters."
                )
            arguments = list(args)
            arguments[param_num] = _by_name(arguments[param_num], model)
            return function(*arguments, **kwargs)

        flattened.flattened = Flattened(model, param_num)  # type: ignore[attr-defined]
        return flattened

    return decorate


def _by_name(flat: Any, model: nn.Module) -> dict[str, Tensor]:
    """Splits a flat vector into a model's parameters, as views of it."""
    named = dict(model.named_parameters())
    sizes = [parameter.numel() for parameter in named.values()]
    if not isinstance(flat, Tensor) or flat.shape != (sum(sizes),):
        shape = list(flat.shape) if isinstance(flat, Tensor) else type(flat).__name__
        raise ConfigError(
            f"The flat parameters have shape {shape}; {type(model).__name__} has {sum(sizes)} "
            f"parameters, so it must be [{sum(sizes)}]."
        )
    parts = flat.split(sizes)
    return {n: part.view(p.shape) for (n, p), part in zip(named.items(), parts, strict=True)}
