"""A model as the passes need it, for as long as they run: frozen, without noise; then restored."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ekfac_dist.models.capture.expert_lists import in_expert_list
from ekfac_dist.models.capture.rotary import frequencies_kept
from ekfac_dist.models.modules import linear_modules, require_usable
from ekfac_dist.models.sharding import reshard

# The attribute by which transformers' models apply an MLP to chunks of positions.
_CHUNK_SIZE = "chunk_size_feed_forward"
# Attributes whose names match make two forwards of one input differ.
_NOISE = re.compile("drop|jitter|noise")


@contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Freezes a model's parameters and turns all noise off; restores both at the end.

    A model in training mode goes into evaluation mode, except for modules whose gradient
    checkpointing works in training mode only and that have no noise of their own. MLPs that are
    applied to chunks of positions are applied to all positions at once: the result is the same, and
    each module is then called once in a forward.

    Args:
        model: The model; its parameters' `requires_grad`, its modules' modes and its rotary
            frequencies come back as they were.

    Raises:
        ModelError: If weights are sharded in an unknown way, or packed for inference alone.
    """
    reshard(model)  # gathered weights show neither how they are sharded nor their flags
    require_usable(model)
    with frequencies_kept(model), _frozen(model):
        yield


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    chunked: list[Any] = [m for m in model.modules() if getattr(m, _CHUNK_SIZE, 0)]
    chunk_sizes = [getattr(module, _CHUNK_SIZE) for module in chunked]
    try:
        for parameter, _ in requires_grad:
            parameter.requires_grad_(False)
        for module in chunked:
            setattr(module, _CHUNK_SIZE, 0)
        checkpointing = _noiseless_checkpointing(model) if model.training else []
        model.eval()
        for module in checkpointing:
            module.training = True
        yield
    finally:
        reshard(model)
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
        for module, size in zip(chunked, chunk_sizes, strict=True):
            setattr(module, _CHUNK_SIZE, size)


def _noiseless_checkpointing(model: nn.Module) -> list[nn.Module]:
    """Modules that checkpoint activations, all without noise, so that they may be in training mode.

    None of them if one has noise, which training mode would turn on; nor if the model has experts
    in lists, whose positions are read from a graph that checkpointing would compute again.
    """
    if any(in_expert_list(model, name) for name in linear_modules(model)):
        return []
    checkpointing = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in checkpointing:
        config = getattr(module, "config", None)
        attributes = vars(module) | (vars(config) if config is not None else {})
        strengths = [value for name, value in attributes.items() if _NOISE.search(name)]
        if any(isinstance(value, (int, float)) and value > 0 for value in strengths):
            return []
    return checkpointing


def start_graph(module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook that makes a module's output the start of the graph, if there is none yet."""
    if not isinstance(output, Tensor) or output.requires_grad:
        return output
    return output.detach().requires_grad_().clone()
