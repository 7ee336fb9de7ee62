"""Gradient checkpointing: a layer's activations are computed again in the backward, not kept.

    forward     layer 1 ─ layer 2 ─ layer 3        of each layer, its inputs alone are kept
    backward    layer 3 again, its gradients; layer 2 again, its gradients; …

A layer is computed again as soon as the gradient of one of its tracked modules arrives, or autograd
asks for a tensor that the layer saved. So a layer's inputs are observed right before its gradients,
and no observer has to hold those of all layers.

`transformers`' own checkpointing acts in training mode only, and PyTorch's `checkpoint` may end the
repeated forward before its last module, or leave it out where nothing was saved.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ekfac_dist.errors import ModelError
from ekfac_dist.models.capture.saved_tensors import SavedTensors
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.models.sharding import layers

_FORWARD = "forward"
ADVICE = "Leave gradient checkpointing off for this model."


class LayerCheckpointing:
    """Lets a model's layers keep their inputs alone, and computes them again in the backward.

    Args:
        model: The prepared model.
        modules: The tracked modules.
        saved: Where to note what is kept; None: nowhere.

    Attributes:
        call: The call of a layer that is being computed; None outside of layers.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[TrackedModule],
        saved: SavedTensors | None = None,
    ) -> None:
        self.call: LayerCall | None = None
        self.saved = saved
        self._layers = {layer: name for name, layer in reversed(layers(model).items())}
        self._with_modules = set(by_layer(self._layers.values(), modules))
        self._own: list[Any] = [
            m for m in model.modules() if getattr(m, "gradient_checkpointing", False)
        ]
        self._calls: WeakSet[LayerCall] = WeakSet()

    @contextmanager
    def active(self) -> Iterator[None]:
        """While it lasts, which is for one forward and its backward, layers are checkpointed.

        The model's own checkpointing, which would compute each layer a third time, is off.
        """
        before = [(layer, vars(layer).get(_FORWARD)) for layer in self._layers]
        try:
            for module in self._own:
                module.gradient_checkpointing = False
            for layer, name in self._layers.items():
                setattr(layer, _FORWARD, self._checkpointed(layer, name))
            yield
        finally:
            for layer, forward in before:
                vars(layer).pop(_FORWARD, None)
                if forward is not None:
                    setattr(layer, _FORWARD, forward)
            for module in self._own:
                module.gradient_checkpointing = True
            for call in list(self._calls):
                call.release()

    @contextmanager
    def computing(self, call: "LayerCall") -> Iterator[None]:
        """While it lasts, a call of a layer is being computed."""
        outer, self.call = self.call, call
        try:
            yield
        finally:
            self.call = outer

    def _checkpointed(self, layer: nn.Module, name: str) -> Callable[..., Any]:
        forward = layer.forward

        @wraps(forward)
        def checkpointed(*args: Any, **kwargs: Any) -> Any:
            needs_grad = name in self._with_modules or any(
                tensor.requires_grad for tensor in _tensors((args, kwargs))
            )
            if self.call is not None or not needs_grad or not torch.is_grad_enabled():
                return forward(*args, **kwargs)  # keeps nothing, or is a part of a layer
            call = LayerCall(self, layer, name, forward, args, kwargs)
            self._calls.add(call)
            return call.first(args, kwargs)

        return checkpointed


class LayerCall:
    """One call of a layer in a forward: what it takes to compute it again.

    Args:
        checkpointing: What it belongs to.
        layer: The layer.
        name: Its name.
        forward: Computes it.
        args: What it is called with.
        kwargs: The same.

    Attributes:
        is_repeated: Whether it is being, or was, computed again.
    """

    def __init__(
        self,
        checkpointing: LayerCheckpointing,
        layer: nn.Module,
        name: str,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.is_repeated = False
        self._checkpointing, self._layer, self._name = checkpointing, layer, name
        self._forward = forward
        # Lists and dictionaries as they are now: the layer, or a later one, may add to them.
        self._arguments = tree_map(lambda leaf: leaf, (args, kwargs))
        self._versions = [_version(tensor) for tensor in _tensors(self._arguments)]
        self._autocast = _autocast_settings(_tensors(self._arguments))
        self._places: list[ref[_Place]] = []

    def first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Computes the layer in the forward; no tensor that autograd saves in it is kept."""
        saved = self._checkpointing.saved
        noted: list[Tensor] = []

        def pack(tensor: Tensor) -> _Place:
            place = _Place(self, tensor)
            self._places.append(ref(place))
            if saved is not None:
                noted.append(tensor)
            return place

        with (
            self._checkpointing.computing(self),
            torch.autograd.graph.saved_tensors_hooks(pack, _unpack),
        ):
            output = self._forward(*args, **kwargs)
        self._require_same_inputs()
        if saved is not None:
            saved.add(_tensors(self._arguments))
            saved.add_layer(noted, self._layer)
        return output

    def repeat(self) -> None:
        """Computes the layer again, if it was not yet.

        Raises:
            ModelError: If it does not save the tensors that it saved in the forward.
        """
        if self.is_repeated:
            return
        self.is_repeated = True
        self._require_same_inputs()
        args, kwargs = self._arguments
        num_saved = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal num_saved
            place = self._places[num_saved]() if num_saved < len(self._places) else None
            num_saved += 1
            tensor = tensor.detach()
            if place is not None:  # else the graph has no use for it
                if (tensor.shape, tensor.dtype) != (place.shape, place.dtype):
                    raise ModelError(
                        f"{self._differs} ({_described(place)} in the forward, "
                        f"{_described(tensor)} in the backward). {ADVICE}"
                    )
                place.tensor = tensor
            return tensor

        with ExitStack() as stack:
            for settings in self._autocast:
                stack.enter_context(torch.autocast(**settings))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self._checkpointing.computing(self))
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, _same))
            self._forward(*args, **kwargs)
        if num_saved != len(self._places):
            raise ModelError(
                f"{self._differs} ({len(self._places)} tensors are saved in the forward, "
                f"{num_saved} in the backward). {ADVICE}"
            )
        self.release()

    def release(self) -> None:
        """Drops what the layer was called with."""
        self._arguments, self._versions = ((), {}), []

    @property
    def _differs(self) -> str:
        return f"Layer {self._name} computes something else when it is computed again"

    def _require_same_inputs(self) -> None:
        if [_version(tensor) for tensor in _tensors(self._arguments)] != self._versions:
            raise ModelError(
                f"Layer {self._name} cannot be computed again in the backward, because a tensor "
                f"that it was called with is written to. {ADVICE}"
            )


class _Place:
    """Placeholder in the graph for a tensor that autograd saved; filled by `LayerCall.repeat`.

    Args:
        call: The layer's call.
        tensor: The tensor, which is not kept.
    """

    def __init__(self, call: LayerCall, tensor: Tensor) -> None:
        self.call, self.shape, self.dtype = call, tensor.shape, tensor.dtype
        self.tensor: Tensor | None = None


def _unpack(place: _Place) -> Tensor:
    place.call.repeat()
    assert place.tensor is not None
    return place.tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _autocast_settings(tensors: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Arguments of `torch.autocast` that restore its state, for the devices of some tensors."""
    return [
        {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        for kind in sorted({"cpu"} | {tensor.device.type for tensor in tensors})
        if torch.amp.is_autocast_available(kind)
    ]


def _described(tensor: Tensor | _Place) -> str:
    return f"{list(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}"


def by_layer(
    layer_names: Iterable[str], modules: Iterable[TrackedModule]
) -> dict[str, list[TrackedModule]]:
    """Tracked modules by the layer that they are in; "" for those that are in none.

    Args:
        layer_names: Names of the layers.
        modules: The modules.
    """
    names, found = set(layer_names), dict[str, list[TrackedModule]]()
    for module in modules:
        parts = module.name.split(".")
        prefixes = (".".join(parts[:k]) for k in range(1, len(parts)))
        found.setdefault(next((p for p in prefixes if p in names), ""), []).append(module)
    return found
