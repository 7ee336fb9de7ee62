"""Where a forward leaves each linear map's input and hidden vector, and how a forward is rewritten.

A cache knows nothing of curvature. While `ihvp_at_x_ekfac` fits, it lends the cache a `Recording`,
which looks over the forward's shoulder; at any other time a cached forward does what it says.
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
from ekfac_dist.functional.recording import Recording, lives_in_a_transform

P = ParamSpec("P")
R = TypeVar("R")

# The attribute by which a module has its cache: setattr(module, KEY, MLPCache()).
KEY = "__cache"


@dataclass(eq=False)
class MLPCache:
    """What passed through the linear maps of an MLP in its last forward.

    Attributes:
        input_hidden_pairs: (input [..., I], hidden vector [..., O]) of each linear map, the hidden
            vector being its output before the activation. One example's rows stand together.
        counted: Which rows count, boolean, one for each row of the inputs (their shape without the
            last dimension); None for all. `func` sets it where a batch has padding, which must not
            count; it holds for that call.
    """

    input_hidden_pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    counted: Tensor | None = None
    # Of caches that hooks fill: the model that they were made for.
    model: nn.Module | None = field(default=None, repr=False)
    recording: Recording | None = field(default=None, init=False, repr=False)

    def collect_states(self) -> list[tuple[Tensor, Tensor]]:
        """The pairs, after `check_type`.

        Raises:
            ModelError: As for `check_type`.
        """
        self.check_type()
        return self.input_hidden_pairs

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, by name: "0.input", "0.hidden", "1.input" and so on."""
        for number, (tensor, hidden) in enumerate(self.input_hidden_pairs):
            yield f"{number}.input", tensor
            yield f"{number}.hidden", hidden

    def clear(self) -> None:
        """Forgets the pairs."""
        self.input_hidden_pairs.clear()

    def zero_grad(self) -> None:
        """Forgets the gradients of the pairs."""
        for _, tensor in self.named_parameters():
            tensor.grad = None

    def retain_grad(self) -> None:
        """Has a backward leave each hidden vector's gradient in its `grad`.

        One that takes no gradient, under `no_grad` or in a transform of `torch.func`, is passed by.
        """
        for _, hidden in self.input_hidden_pairs:
            if hidden.requires_grad and not lives_in_a_transform(hidden):
                hidden.retain_grad()

    def check_type(self) -> None:
        """Makes sure that the pairs are pairs of tensors with equally many rows.

        Raises:
            ModelError: One is not; it is named by its number.
        """
        for number, pair in enumerate(self.input_hidden_pairs):
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
                raise ModelError(
                    f"Entry {number} of input_hidden_pairs is a {type(pair).__name__}; it must be "
                    "a pair (input, hidden vector)."
                )
            for what, tensor in zip(("input", "hidden vector"), pair, strict=True):
                if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
                    given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                    raise ModelError(
                        f"The {what} of pair {number} is {given}; it must be a tensor of floating "
                        "point."
                    )
            if pair[0].shape[:-1] != pair[1].shape[:-1] or not pair[0].ndim:
                raise ModelError(
                    f"Pair {number} has an input of shape {list(pair[0].shape)} and a hidden "
                    f"vector of shape {list(pair[1].shape)}; they must agree in all but the last "
                    "dimension."
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> "MLPCache":
        """A cache with copies of the values; a copy has no part in the graph."""
        pairs = [
            tuple(_copied(tensor) for tensor in pair)
            for pair in self.input_hidden_pairs
            if not any(map(lives_in_a_transform, pair))
        ]
        # A copy of the model takes copies of its caches; a copied cache takes no model with it.
        model = memo.get(id(self.model), self.model)
        copied = MLPCache(pairs, copy.deepcopy(self.counted, memo), model)  # type: ignore[arg-type]
        memo[id(self)] = copied
        return copied


def _copied(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    if not lives_in_a_transform(tensor) and tensor.is_leaf is False and tensor.retains_grad:
        copied.grad = None if tensor.grad is None else tensor.grad.clone()
    return copied


def manual(forward_func: Callable[P, R]) -> Callable[P, R]:
    """Decorates a forward that was rewritten to record its pairs.

    With no cache at the module (no attribute `KEY`) the forward runs as it is. With one, the cache
    is cleared, the forward runs, and the pairs are checked and retain their gradients.

    Args:
        forward_func: A module's forward; it appends to `getattr(self, KEY).input_hidden_pairs`
            the input and the output of each of the module's linear maps.

    Raises:
        ConfigError: The attribute is something else than a cache.
        ModelError: What was recorded are no pairs of tensors.
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
        recording, before = cache.recording, list(cache.input_hidden_pairs)
        cache.clear()
        with nullcontext() if recording is None else recording.of(module, cache):
            outputs = forward_func(*args, **kwargs)
        cache.check_type()
        if recording is None:
            keep(cache)
        elif before and is_aside(cache):
            cache.input_hidden_pairs[:] = before
        return outputs

    return cached_forward


def is_aside(cache: MLPCache) -> bool:
    """Whether a forward is one that a fit has no use for, such as to draw labels, by `no_grad`."""
    return cache.recording is not None and not torch.is_grad_enabled()


def keep(cache: MLPCache) -> None:
    """Retains gradients, or forgets what does not outlive the transform that it was made in."""
    if any(lives_in_a_transform(tensor) for _, tensor in cache.named_parameters()):
        cache.clear()
    else:
        cache.retain_grad()
