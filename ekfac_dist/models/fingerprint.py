"""By what a model is known again: its tracked parameters' bytes."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ekfac_dist.models.adapters import adapted_weights
from ekfac_dist.models.modules import TrackedModule, tensors_of


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
    for module in modules:
        own = ((name.rpartition(".")[2], tensor) for name, tensor in tensors_of(model, module))
        for kind, tensor in (*own, *adapted_weights(model, module.name)):
            _add(digest, f"{module.name}.{kind}", tensor.to(dtype=dtype))
    return digest.hexdigest()


def whole_fingerprint(model: nn.Module) -> str:
    """SHA-256 over all of a model's parameters and buffers; what is kept elsewhere by its shape."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        held = tensor.detach()
        _add(digest, name, torch.empty(0, *held.shape) if held.is_meta else held)
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    content = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    digest.update(content.numpy().data)


def narrower_fingerprints(model: nn.Module, modules: Sequence[TrackedModule]) -> dict[str, str]:
    """The same of the parameters rounded to each narrower dtype, by the dtype's name.

    By them a model is known again that holds the same weights in less precision.
    """
    own = min(t.element_size() for m in modules for _, t in tensors_of(model, m))
    return {
        str(dtype).removeprefix("torch."): fingerprint(model, modules, dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        if dtype.itemsize < own
    }
