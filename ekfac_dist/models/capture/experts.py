"""Fused experts: linear maps that have no module of their own, made observable one by one.

`transformers` keeps all experts' weights of a layer in three-dimensional parameters, and computes
with them by an implementation from a registry. The implementation here sorts a layer's tokens by
expert, multiplies expert by expert and does all else at once, and passes what goes into and comes
out of each matrix to a listener; its result is the same sum.

    experts.3.gate_up_proj      the slice of experts.gate_up_proj of expert 3, as a module
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
    """What passes through one matrix of all experts: the vectors of tokens, sorted by expert.

    A token has a vector for each expert that it is routed to.

    Attributes:
        matrix: Name of the parameter that holds the matrices.
        inputs: [n, I], without the bias coordinate.
        outputs: [n, O].
        tokens: Flat index of each vector's token [n], ascending in each expert, on the host: one
            array for both matrices.
        sizes: How many vectors each expert has, on the host [experts]; they sum to n.
        num_tokens: All tokens of the batch.
    """

    matrix: str
    inputs: Tensor
    outputs: Tensor
    tokens: np.ndarray
    sizes: np.ndarray
    num_tokens: int


# Gets what passes through the experts' matrices, and returns the outputs to continue with.
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
    """Σ over a token's experts of weight · down(act(up(x)))."""
    listener = _LISTENERS.get(self)
    num_experts, (num_tokens, top_k) = self.down_proj.shape[0], top_k_index.shape
    # Sorted on the host, for all experts at once: a GPU is waited for once a layer.
    chosen = top_k_index.cpu().numpy().reshape(-1)
    sizes = np.bincount(chosen, minlength=num_experts)[:num_experts]
    # An expert's tokens ascend; the last ones are unused slots of the top k.
    slots = np.argsort(chosen, kind="stable")[: sizes.sum()]
    host_tokens = slots // top_k
    slots_and_tokens = torch.from_numpy(np.stack([slots, host_tokens]))
    device_slots, tokens = to_device(slots_and_tokens, hidden_states.device)

    def passed(matrix: str, inputs: Tensor) -> Tensor:
        inputs = inputs.to(getattr(self, matrix).dtype)
        outputs = _apply_matrices(self, matrix, inputs, sizes)
        if listener is None:
            return outputs
        return listener(Routed(matrix, inputs, outputs, host_tokens, sizes, num_tokens))

    up, down = matrices(self)
    hidden = passed(up, hidden_states[tokens])
    hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
    hidden = passed(down, hidden)
    if self.has_post_expert_norm:
        hidden = self.post_expert_norm(hidden)
    weighted = hidden * top_k_weights.reshape(-1)[device_slots, None]
    of_slots = weighted.new_zeros(num_tokens * top_k, weighted.shape[-1])
    of_slots = of_slots.index_copy(0, device_slots, weighted)
    # Summed slot by slot: on a GPU `index_add_` adds in another order each time.
    return of_slots.view(num_tokens, top_k, -1).sum(1).to(hidden_states.dtype)


def _apply_matrices(experts: Any, matrix: str, inputs: Tensor, sizes: np.ndarray) -> Tensor:
    """The experts' matrices times their inputs [n, I], sorted by expert: [n, O]."""
    weights, outputs = getattr(experts, matrix), []
    if experts.is_transposed:
        weights = weights.mT
    biases = getattr(experts, f"{matrix}_bias") if experts.has_bias else None
    for expert, rows in enumerate(inputs.split(sizes.tolist())):
        if len(rows):
            bias = None if biases is None else biases[expert]
            outputs.append(torch.nn.functional.linear(rows, weights[expert], bias))
    return torch.cat(outputs)
