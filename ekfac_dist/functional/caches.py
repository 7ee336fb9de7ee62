"""Caches, in which a forward records the input and the hidden vector of each linear map.

A cache knows nothing of curvature. While `ihvp_at_x_ekfac` fits, a `Recording` is attached to it,
which observes the linear maps during the forward; at other times a forward only fills the cache.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ekfac_dist.errors import ConfigError, ModelError
from ekfac_dist.functional.recording import Recording, is_in_transform

P = ParamSpec("P")
R = TypeVar("R")

# Name of the attribute that holds a module's cache: setattr(module, KEY, MLPCache()).
KEY = "__cache"


@dataclass(eq=False)
class MLPCache:
    """Inputs and hidden vectors of an MLP's linear maps in the last forward.

    Attributes:
        input_hidden_pairs: (input [..., I], hidden vector [..., O]) of each linear map, the hidden
            vector being its output before the activation. All leading dimensions together count
            positions; an example's positions are adjacent.
        counted: Boolean mask of the positions that count, of the inputs' shape without the last
            dimension; None if all count. `func` sets it in every call in which a batch has padding,
            which must not count.
    """

    input_hidden_pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    counted: Tensor | None = None
    # The model whose hooks fill the cache; None for a cache that a rewritten forward fills.
    model: nn.Module | None = field(default=None, repr=False)
    recording: Recording | None = field(default=None, init=False, repr=False)

    def collect_states(self) -> list[tuple[Tensor, Tensor]]:
        """The pairs, checked.

        Raises:
            ModelError: As for `check_type`.
        """
        self.check_type()
        return self.input_hidden_pairs

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, tensor) of all pairs: "0.input", "0.hidden", "1.input" and so on."""
        for index, (tensor, hidden) in enumerate(self.input_hidden_pairs):
            yield f"{index}.input", tensor
            yield f"{index}.hidden", hidden

    def clear(self) -> None:
        """Removes all pairs."""
        self.input_hidden_pairs.clear()

    def zero_grad(self) -> None:
        """Sets the `grad` of every tensor of the pairs to None."""
        for _, tensor in self.named_parameters():
            tensor.grad = None

    def retain_grad(self) -> None:
        """Makes a backward pass keep each hidden vector's gradient in its `grad`.

        Hidden vectors that take no gradient, as under `no_grad` or inside a transform of
        `torch.func`, are skipped.
        """
        for _, hidden in self.input_hidden_pairs:
            if hidden.requires_grad and not is_in_transform(hidden):
                hidden.retain_grad()

    def check_type(self) -> None:
        """Checks that all pairs are pairs of floating-point tensors of equal leading dimensions.

        Raises:
            ModelError: If one is not; the message has its index.
        """
        for index, pair in enumerate(self.input_hidden_pairs):
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
                raise ModelError(
                    f"Entry {index} of input_hidden_pairs is a {type(pair).__name__}; it must be "
                    "a pair (input, hidden vector)."
                )
            for role, tensor in zip(("input", "hidden vector"), pair, strict=True):
                if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
                    kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                    raise ModelError(
                        f"The {role} of pair {index} is {kind}; it must be a tensor of floating "
                        "point."
                    )
            if pair[0].shape[:-1] != pair[1].shape[:-1] or not pair[0].ndim:
                raise ModelError(
                    f"Pair {index} has an input of shape {list(pair[0].shape)} and a hidden "
                    f"vector of shape {list(pair[1].shape)}; they must agree in all but the last "
                    "dimension."
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> "MLPCache":
        """A cache with copies of the tensors, detached from the autograd graph."""
        pairs = [
            tuple(_detached_copy(tensor) for tensor in pair)
            for pair in self.input_hidden_pairs
            if not any(map(is_in_transform, pair))
        ]
        # Copying a model copies its caches; copying a cache alone does not copy its model.
        model = memo.get(id(self.model), self.model)
        copied = MLPCache(pairs, copy.deepcopy(self.counted, memo), model)  # type: ignore[arg-type]
        memo[id(self)] = copied
        return copied


def _detached_copy(tensor: Tensor) -> Tensor:
    """A copy outside the autograd graph, with a copy of the gradient that a hidden vector kept."""
    copied = tensor.detach().clone()
    if not is_in_transform(tensor) and tensor.is_leaf is False and tensor.retains_grad:
        copied.grad = None if tensor.grad is None else tensor.grad.clone()
    return copied


def manual(forward_func: Callable[P, R]) -> Callable[P, R]:
    """Decorates a forward that was rewritten to record its pairs.

    If the module has no cache (no attribute `KEY`), the forward runs unchanged. Otherwise the cache
    is cleared, the forward runs, the pairs are checked, and their gradients are retained.

    Args:
        forward_func: A module's forward; it appends the input and the output of each of the
            module's linear maps to `getattr(self, KEY).input_hidden_pairs`.

    Raises:
        ConfigError: When the forward runs, if the attribute is no `MLPCache`.
        ModelError: When the forward runs, if it recorded something other than pairs of tensors.
    """

    @wraps(forward_func)
    def cached_forward(*args: P.args, **kwargs: P.kwargs) -> R:
        module: Any = args[0]
        if not hasattr(module, KEY):
            return forward_func(*args, **kwargs)
        cache = getattr(module, KEY)
        if not isinstance(cache, MLPCache):
            raise ConfigError(
                f"The attribute {KEY!r} of {type(module).__name__} is a {type(cache).__name__}; it "
                "must be an MLPCache, or not be there."
            )
        recording, earlier_pairs = cache.recording, list(cache.input_hidden_pairs)
        cache.clear()
        with nullcontext() if recording is None else recording.filling(module, cache):
            outputs = forward_func(*args, **kwargs)
        cache.check_type()
        if recording is None:
            retain_or_clear(cache)
        elif earlier_pairs and is_without_gradients(cache):
            cache.input_hidden_pairs[:] = earlier_pairs
        return outputs

    return cached_forward


def is_without_gradients(cache: MLPCache) -> bool:
    """Whether this forward runs under `no_grad` during a fit, as one that only draws labels does.

    A fit has no use for the pairs of such a forward.
    """
    return cache.recording is not None and not torch.is_grad_enabled()


def retain_or_clear(cache: MLPCache) -> None:
    """Retains the pairs' gradients; clears pairs that end with their `torch.func` transform."""
    if any(is_in_transform(tensor) for _, tensor in cache.named_parameters()):
        cache.clear()
    else:
        cache.retain_grad()
