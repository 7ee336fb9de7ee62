"""SHA-256 fingerprints of a model's weights.

A store of factors is used only with the model that it was fitted for, which is recognised by the
bytes of its tracked parameters, and of all its weights. To fingerprint a sharded model is a
collective.
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
    persistent_buffers,
    quantised_weights,
    tensors_of,
    weight_values,
)
from ekfac_dist.models.sharding import reshard

# Dtypes in which the same model may be loaded with less precision, the widest first.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Hexadecimal digits that are stored of a single weight's SHA-256.
_NUM_DIGITS = 16

# {weight's name: {dtype: SHA-256}}, the dtype that the weight is held in first.
Digests = Mapping[str, Mapping[str, str]]
# From a weight's name and values, the dtypes besides its own in which it is fingerprinted.
DtypesOf = Callable[[str, Tensor], Iterable[torch.dtype]]


@dataclass(frozen=True)
class Fingerprints:
    """SHA-256 of a model's weights.

    Attributes:
        tracked: Over names, dtypes, shapes and bytes of the tracked modules' parameters.
        narrower: {dtype: the same of these parameters rounded to that dtype}, for each narrower
            dtype. They recognise a model that holds the same weights in less precision.
        whole: Over names, dtypes, shapes and bytes of all parameters and persistent buffers. Other
            buffers do not count: some models change them in a forward.
        untracked: {name: {dtype: first digits}} of each weight outside the tracked modules. A tied
            parameter is listed under each of its names.
        quantised: Names of the quantised weights outside the tracked modules, which hold codes.
            They are not in `untracked`.
    """

    tracked: str
    narrower: dict[str, str]
    whole: str
    untracked: dict[str, dict[str, str]]
    quantised: tuple[str, ...]


def narrower_dtypes(name: str, tensor: Tensor) -> tuple[torch.dtype, ...]:
    """Floating-point dtypes that have fewer bytes than a tensor's; none for integers."""
    if not tensor.is_floating_point():
        return ()
    return tuple(dtype for dtype in _DTYPES if dtype.itemsize < tensor.element_size())


def fingerprints(
    model: nn.Module, modules: Iterable[TrackedModule], other_dtypes: DtypesOf = narrower_dtypes
) -> Fingerprints:
    """All fingerprints of a model, from reading each of its weights once.

    Args:
        model: The model.
        modules: Its tracked modules, in model order.
        other_dtypes: The dtypes to which a weight is rounded for further fingerprints.

    Raises:
        ModelError: If no device holds a weight's values.
    """
    modules = tuple(modules)
    tracked_names = {name for module in modules for name in module.parameters}
    # Other tensors of a tracked module, such as the scales of its codes, belong to it as well.
    module_names = {module.name for module in modules}
    quantised = {
        name for name in quantised_weights(model) if name.rpartition(".")[0] not in module_names
    }
    digests: dict[str, str] = {}
    untracked: dict[str, dict[str, str]] = {}

    def add_weight(names: list[str], tensor: Tensor) -> None:
        dtype, digest = _name_of_dtype(tensor.dtype), _tensor_sha256(tensor)
        digests.update((name, f"{dtype}|{digest}") for name in names)
        digest_by_dtype = {dtype: digest}
        outside_names = [
            name
            for name in names
            if name not in tracked_names | quantised and name.rpartition(".")[0] not in module_names
        ]
        for name in outside_names[:1]:
            digest_by_dtype |= {
                _name_of_dtype(dtype): _tensor_sha256(tensor.to(dtype=dtype))
                for dtype in other_dtypes(name, tensor)
            }
        stored = {dtype: digest[:_NUM_DIGITS] for dtype, digest in digest_by_dtype.items()}
        untracked.update((name, dict(stored)) for name in outside_names)

    tracked = hashlib.sha256()
    narrower = {dtype: hashlib.sha256() for dtype in _DTYPES}
    for name, tensor in _visit_weights(model, modules, add_weight):
        _add_tensor(tracked, name, tensor)
        dtypes = set(other_dtypes(name, tensor))
        narrower = {dtype: digest for dtype, digest in narrower.items() if dtype in dtypes}
        for dtype, digest in narrower.items():
            _add_tensor(digest, name, tensor.to(dtype=dtype))
    for name, scale in adapter_scales(model):
        digests[name] = hashlib.sha256(scale.encode()).hexdigest()
        untracked[name] = {"text": digests[name][:_NUM_DIGITS]}
    lines = "".join(f"{name}|{digests[name]}\n" for name in sorted(digests))
    return Fingerprints(
        tracked=tracked.hexdigest(),
        narrower={_name_of_dtype(dtype): digest.hexdigest() for dtype, digest in narrower.items()},
        whole=hashlib.sha256(lines.encode()).hexdigest(),
        untracked=dict(sorted(untracked.items())),
        quantised=tuple(sorted(quantised)),
    )


def tracked_fingerprint(
    model: nn.Module, modules: Iterable[TrackedModule], dtype: torch.dtype
) -> str:
    """`Fingerprints.tracked` as it would be with the parameters in another dtype."""
    digest = hashlib.sha256()
    for name, tensor in _tracked_parameters(
        model, modules, lambda name: weight_values(model, name)
    ):
        _add_tensor(digest, name, tensor.to(dtype=dtype))
    return digest.hexdigest()


def _visit_weights(
    model: nn.Module, modules: Iterable[TrackedModule], visit: Callable[[list[str], Tensor], None]
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tracked parameters, each with its module's name, and visits every weight.

    Args:
        model: The model.
        modules: Its tracked modules.
        visit: Called once for each weight of the model, with all of its names.
    """
    reshard(model)  # gathered weights are other parameter objects
    names = all_parameter_names(model)
    unvisited = dict.fromkeys(names)

    def load(name: str) -> Tensor:
        tensor = weight_values(model, name)
        key = id(model.get_parameter(name))
        if key in unvisited:
            del unvisited[key]
            visit(names[key], tensor)
        return tensor

    yield from _tracked_parameters(model, modules, load)
    for key in list(unvisited):
        load(names[key][0])
    for name in persistent_buffers(model):
        visit([name], weight_values(model, name))


def _tracked_parameters(
    model: nn.Module, modules: Iterable[TrackedModule], load: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tracked parameters, each with its module's name; each is loaded once."""
    reshard(model)
    weights: dict[str, Tensor] = {}

    def load_once(name: str) -> Tensor:
        # All experts of a collection are slices of one parameter, which is gathered once.
        if name not in weights:
            owner = name.rpartition(".")[0]
            for other in [other for other in weights if other.rpartition(".")[0] != owner]:
                del weights[other]
            weights[name] = load(name)
        return weights[name]

    for module in modules:
        tensors = tensors_of(model, module, load_once)
        module_tensors = ((name.rpartition(".")[2], tensor) for name, tensor in tensors)
        for kind, tensor in (*module_tensors, *adapted_weights(model, module.name)):
            yield f"{module.name}.{kind}", tensor


def _tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's shape and bytes."""
    digest = hashlib.sha256(f"{tuple(tensor.shape)}|".encode())
    digest.update(_bytes(tensor))
    return digest.hexdigest()


def _add_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Updates a digest with a tensor's name, dtype, shape and bytes."""
    digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    digest.update(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's elements as bytes, on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _name_of_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
