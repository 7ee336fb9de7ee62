"""By what a model is known again: the bytes of its tracked parameters, and of all its weights.

Of a sharded model each of these is a collective.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ekfac_dist.models.load.adapters import adapted_weights, adapter_scales
from ekfac_dist.models.modules import (
    TrackedModule,
    all_parameter_names,
    loaded,
    persistent_buffers,
    quantised_weights,
    tensors_of,
)
from ekfac_dist.models.sharding import reshard

# What a model's weights may be held in beside their own dtype.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Characters that are kept of a single weight's SHA-256.
_KEPT = 16

# By a weight's name, its SHA-256 by dtype, the one that it is held in first.
Digests = Mapping[str, Mapping[str, str]]
# Gives the dtypes that a weight, of some name, is fingerprinted in beside its own.
DtypesOf = Callable[[str, Tensor], Iterable[torch.dtype]]


@dataclass(frozen=True)
class Fingerprints:
    """SHA-256 of a model's weights.

    Attributes:
        tracked: Over names, dtypes, shapes and bytes of the tracked modules' parameters.
        narrower: The same of these parameters rounded to each narrower dtype, by dtype. By those a
            model is known again that holds the same weights in less precision.
        whole: Over names, dtypes, shapes and bytes of all parameters and persistent buffers. Other
            buffers do not count: some models change them in a forward.
        untracked: Of each weight that is no tracked module's, the first characters, by its name and
            the dtype. A tied parameter stands under each of its names.
        quantised: Weights outside the tracked modules that are held as codes; not in `untracked`.
    """

    tracked: str
    narrower: dict[str, str]
    whole: str
    untracked: dict[str, dict[str, str]]
    quantised: tuple[str, ...]


def narrower_dtypes(name: str, tensor: Tensor) -> tuple[torch.dtype, ...]:
    """Dtypes of floating point that are narrower than a tensor's."""
    if not tensor.is_floating_point():
        return ()
    return tuple(dtype for dtype in _DTYPES if dtype.itemsize < tensor.element_size())


def fingerprints(
    model: nn.Module, modules: Iterable[TrackedModule], beside: DtypesOf = narrower_dtypes
) -> Fingerprints:
    """Every fingerprint of a model, in one walk over its weights.

    Args:
        model: The model.
        modules: Its tracked modules, in model order.
        beside: Which dtypes weights are fingerprinted in beside their own, as if rounded to them.

    Raises:
        ModelError: The numbers of a weight are nowhere.
    """
    modules = tuple(modules)
    of_modules = {name for module in modules for name in module.parameters}
    owners = {module.name for module in modules}  # which may hold more, such as scales of codes
    quantised = {name for name in quantised_weights(model) if name.rpartition(".")[0] not in owners}
    own: dict[str, str] = {}
    untracked: dict[str, dict[str, str]] = {}

    def see(names: list[str], tensor: Tensor) -> None:
        dtype, digest = _name(tensor.dtype), _digest(tensor)
        own.update((name, f"{dtype}|{digest}") for name in names)
        digests = {dtype: digest}
        outside = [
            name
            for name in names
            if name not in of_modules | quantised and name.rpartition(".")[0] not in owners
        ]
        for name in outside[:1]:
            digests |= {_name(d): _digest(tensor.to(dtype=d)) for d in beside(name, tensor)}
        untracked.update((name, {d: s[:_KEPT] for d, s in digests.items()}) for name in outside)

    tracked = hashlib.sha256()
    narrower = {dtype: hashlib.sha256() for dtype in _DTYPES}
    for name, tensor in _walk(model, modules, see):
        _add(tracked, name, tensor)
        dtypes = set(beside(name, tensor))
        narrower = {dtype: digest for dtype, digest in narrower.items() if dtype in dtypes}
        for dtype, digest in narrower.items():
            _add(digest, name, tensor.to(dtype=dtype))
    for name, scale in adapter_scales(model):
        own[name] = hashlib.sha256(scale.encode()).hexdigest()
        untracked[name] = {"text": own[name][:_KEPT]}
    lines = "".join(f"{name}|{own[name]}\n" for name in sorted(own))
    return Fingerprints(
        tracked=tracked.hexdigest(),
        narrower={_name(dtype): digest.hexdigest() for dtype, digest in narrower.items()},
        whole=hashlib.sha256(lines.encode()).hexdigest(),
        untracked=dict(sorted(untracked.items())),
        quantised=tuple(sorted(quantised)),
    )


def tracked_fingerprint(
    model: nn.Module, modules: Iterable[TrackedModule], dtype: torch.dtype
) -> str:
    """`Fingerprints.tracked`, as if the parameters were held in another dtype."""
    digest = hashlib.sha256()
    for name, tensor in _tracked(model, modules, lambda name: loaded(model, name)):
        _add(digest, name, tensor.to(dtype=dtype))
    return digest.hexdigest()


def _walk(
    model: nn.Module, modules: Iterable[TrackedModule], see: Callable[[list[str], Tensor], None]
) -> Iterator[tuple[str, Tensor]]:
    """The tracked parameters under their modules' names.

    Args:
        model: The model.
        modules: Its tracked modules.
        see: Given each of all weights once, with all of its names.
    """
    reshard(model)  # what is gathered are other parameters
    names = all_parameter_names(model)
    unseen = dict.fromkeys(names)

    def numbers(name: str) -> Tensor:
        tensor = loaded(model, name)
        key = id(model.get_parameter(name))
        if key in unseen:
            del unseen[key]
            see(names[key], tensor)
        return tensor

    yield from _tracked(model, modules, numbers)
    for key in list(unseen):
        numbers(names[key][0])
    for name in persistent_buffers(model):
        see([name], loaded(model, name))


def _tracked(
    model: nn.Module, modules: Iterable[TrackedModule], load: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The tracked parameters under their modules' names, each loaded once."""
    reshard(model)
    held: dict[str, Tensor] = {}

    def numbers(name: str) -> Tensor:
        # All experts of a collection are parts of one parameter, which is gathered once.
        if name not in held:
            owner = name.rpartition(".")[0]
            for other in [other for other in held if other.rpartition(".")[0] != owner]:
                del held[other]
            held[name] = load(name)
        return held[name]

    for module in modules:
        tensors = tensors_of(model, module, numbers)
        own = ((name.rpartition(".")[2], tensor) for name, tensor in tensors)
        for kind, tensor in (*own, *adapted_weights(model, module.name)):
            yield f"{module.name}.{kind}", tensor


def _digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's shape and bytes."""
    digest = hashlib.sha256(f"{tuple(tensor.shape)}|".encode())
    digest.update(_bytes(tensor))
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    digest.update(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
