"""By what a model is known again: its tracked parameters' bytes.

Of a sharded model each of these is a collective.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ekfac_dist.models.adapters import adapted_weights
from ekfac_dist.models.modules import TrackedModule, loaded, tensors_of
from ekfac_dist.models.sharding import reshard

# What a model's weights may be held in beside their own dtype.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fingerprint(
    model: nn.Module, modules: Iterable[TrackedModule], dtype: torch.dtype | None = None
) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the tracked modules' parameters.

    Args:
        model: The model.
        modules: Its tracked modules, in model order.
        dtype: As if the parameters were held in that one; None: as they are.
    """
    digest = hashlib.sha256()
    for name, tensor in _tracked(model, modules):
        _add(digest, name, tensor.to(dtype=dtype))
    return digest.hexdigest()


def fingerprints(model: nn.Module, modules: Iterable[TrackedModule]) -> tuple[str, dict[str, str]]:
    """The same, and of the parameters rounded to each narrower dtype, by the dtype's name.

    By those a model is known again that holds the same weights in less precision.
    """
    own, narrower = hashlib.sha256(), {dtype: hashlib.sha256() for dtype in _DTYPES}
    for name, tensor in _tracked(model, modules):
        _add(own, name, tensor)
        narrower = {d: s for d, s in narrower.items() if d.itemsize < tensor.element_size()}
        for dtype, digest in narrower.items():
            _add(digest, name, tensor.to(dtype=dtype))
    return own.hexdigest(), {
        str(dtype).removeprefix("torch."): digest.hexdigest() for dtype, digest in narrower.items()
    }


def _tracked(model: nn.Module, modules: Iterable[TrackedModule]) -> Iterator[tuple[str, Tensor]]:
    """The tracked parameters under their modules' names."""
    reshard(model)
    held: dict[str, Tensor] = {}

    def numbers(name: str) -> Tensor:
        # All experts of a collection are parts of one parameter, which is gathered once.
        if name not in held:
            owner = name.rpartition(".")[0]
            for other in [other for other in held if other.rpartition(".")[0] != owner]:
                del held[other]
            held[name] = loaded(model, name)
        return held[name]

    for module in modules:
        tensors = tensors_of(model, module, numbers)
        own = ((name.rpartition(".")[2], tensor) for name, tensor in tensors)
        for kind, tensor in (*own, *adapted_weights(model, module.name)):
            yield f"{module.name}.{kind}", tensor


def whole_fingerprint(model: nn.Module) -> str:
    """SHA-256 over all of a model's parameters and buffers.

    Raises:
        ModelError: The numbers of a parameter are nowhere.
    """
    digest = hashlib.sha256()
    reshard(model)
    for name, _ in model.named_parameters():
        _add(digest, name, loaded(model, name))
    for name, buffer in model.named_buffers():
        _add(digest, name, torch.empty(0, *buffer.shape) if buffer.is_meta else buffer)
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    content = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    digest.update(content.numpy().data)
