"""Fused experts: linear maps that have no module of their own, made observable one by one.

`transformers` keeps all experts' weights of a layer in three-dimensional parameters, and computes
with them by an implementation from a registry. The implementation here computes expert by expert,
and passes each expert's input and output to a listener; its result is the same sum.

    experts.3.gate_up_proj      the slice of experts.gate_up_proj of expert 3, as a module
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ekfac_dist.data.batches import to_device
from ekfac_dist.models.modules import EXPERT, TrackedModule

IMPLEMENTATION = "ekfac_dist"


@dataclass(frozen=True)
class Routed:
    """What passes through one matrix of one expert: the vectors of the n tokens routed to it.

    Attributes:
        expert: The expert's index.
        matrix: Name of the parameter that holds its matrix.
        inputs: [n, I], without the bias coordinate.
        outputs: [n, O].
        tokens: Flat indices of the tokens [n], ascending, on the host: one array for both matrices.
        num_tokens: All tokens of the batch.
    """

    expert: int
    matrix: str
    inputs: Tensor
    outputs: Tensor
    tokens: np.ndarray
    num_tokens: int


# Gets what passes through an expert's matrix, and returns the outputs to continue with.
Listener = Callable[[Routed], Tensor]

_LISTENERS: "WeakKeyDictionary[nn.Module, Listener]" = WeakKeyDictionary()


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Every collection of fused experts in a model, by name, in model order."""
    return {name: module for name, module in model.named_modules() if _is_fused(module)}


def expert_modules(name: str, experts: nn.Module) -> Iterator[TrackedModule]:
    """Each matrix of each expert as a tracked module, in order.

    Args:
        name: Name of the collection.
        experts: The collection.
    """
    module: Any = experts
    for expert in range(module.down_proj.shape[0]):
        for matrix in matrices(experts):
            num_outputs, num_inputs = getattr(module, matrix).shape[1:]
            if module.is_transposed:
                num_outputs, num_inputs = num_inputs, num_outputs
            module_name = f"{name}.{expert}.{matrix}"
            yield TrackedModule(
                module_name,
                EXPERT,
                num_inputs,
                num_outputs,
                module.has_bias,
                f"{module_name}.input",
                f"{module_name}.output",
            )


def matrices(experts: nn.Module) -> tuple[str, str]:
    """Names of the parameters that hold the experts' matrices, in the order of the forward."""
    return ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")


@contextmanager
def listening(listeners: Mapping[nn.Module, Listener]) -> Iterator[None]:
    """While it lasts, collections of experts pass what they compute to listeners.

    Args:
        listeners: The listener of each collection.
    """
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward_by_expert)
    with experts_computed_by(IMPLEMENTATION, listeners):
        try:
            _LISTENERS.update(listeners)
            yield
        finally:
            for experts in listeners:
                _LISTENERS.pop(experts, None)


@contextmanager
def experts_computed_by(implementation: str, collections: Iterable[nn.Module]) -> Iterator[None]:
    """While it lasts, collections of experts compute by another implementation.

    Args:
        implementation: The implementation's name in the registry of `transformers`.
        collections: The collections.
    """
    configs: dict[int, Any] = {}
    for experts in collections:
        config: Any = experts.config
        configs[id(config)] = config
    before = {key: config._experts_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._experts_implementation = implementation
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]


def _is_fused(module: nn.Module) -> bool:
    """Whether a module is a collection of fused experts that the registry computes."""
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed")):
        return False
    parameters = [getattr(module, matrix, None) for matrix in matrices(module)]
    return all(isinstance(p, Tensor) and p.ndim == 3 for p in parameters)


def _forward_by_expert(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Σ over a token's experts of weight · down(act(up(x))), expert by expert."""
    listener = _LISTENERS.get(self)
    up, down = matrices(self)
    total = torch.zeros_like(hidden_states)
    num_tokens, top_k = top_k_index.shape
    # Sorted on the host, for all experts at once: a GPU is waited for once a layer, not by expert.
    chosen = top_k_index.cpu().numpy().reshape(-1)
    order = np.argsort(chosen, kind="stable")  # an expert's tokens ascend
    places = to_device(torch.from_numpy(order), hidden_states.device)
    ends = np.cumsum(np.bincount(chosen, minlength=self.down_proj.shape[0]))
    weights = top_k_weights.reshape(-1)
    for expert in range(self.down_proj.shape[0]):  # above are unused slots of the top k
        part = slice(ends[expert - 1] if expert else 0, ends[expert])
        if part.start == part.stop:
            continue
        here, host_tokens = places[part], order[part] // top_k
        tokens = here // top_k
        passed = partial(_apply_matrix, self, expert, host_tokens, num_tokens, listener)
        hidden = passed(up, hidden_states[tokens])
        hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
        hidden = passed(down, hidden)
        if self.has_post_expert_norm:
            hidden = self.post_expert_norm(hidden)
        weighted = hidden * weights[here, None]
        total.index_add_(0, tokens, weighted.to(total.dtype))
    return total


def _apply_matrix(
    experts: Any,
    expert: int,
    tokens: np.ndarray,
    num_tokens: int,
    listener: Listener | None,
    matrix: str,
    inputs: Tensor,
) -> Tensor:
    """One expert's matrix times its inputs [n, I], passed through the listener: [n, O]."""
    weight = getattr(experts, matrix)[expert]
    if experts.is_transposed:
        weight = weight.T
    bias = getattr(experts, f"{matrix}_bias")[expert] if experts.has_bias else None
    inputs = inputs.to(weight.dtype)
    output = torch.nn.functional.linear(inputs, weight, bias)
    if listener is None:
        return output
    return listener(Routed(expert, matrix, inputs, output, tokens, num_tokens))
