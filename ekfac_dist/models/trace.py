"""One forward of a few tokens, and what it shows of a model's modules.

Knows nothing of MLPs: only what passed through which linear map, and which modules let a position
see others.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ekfac_dist.models.experts import Routed, fused_experts, listening
from ekfac_dist.models.modules import only_input

# Unequal numbers, so that sequences and positions can be told apart by a shape.
NUM_SEQUENCES, NUM_TOKENS = 2, 5


@dataclass
class Trace:
    """What a forward showed.

    Attributes:
        inputs: Of each linear map, or collection of experts, every tensor that it was called with,
            and its version then.
        by_position: Linear maps whose rows are not sequence by sequence, and their inputs' shape.
        mixing: Modules whose output at one position depends on their input at others, though none
            of the modules in them is such a one: where attention, or a recurrence, happens.
    """

    inputs: dict[str, list[tuple[Tensor, int]]] = field(default_factory=dict)
    by_position: dict[str, list[int]] = field(default_factory=dict)
    mixing: set[str] = field(default_factory=set)


@torch.enable_grad()
def trace(model: nn.Module, names: Iterable[str], device: torch.device) -> Trace:
    """Runs a few tokens through a model.

    Args:
        model: A causal language model, frozen and in evaluation mode.
        names: Names of its linear maps and collections of experts.
        device: Where the tokens go.
    """
    names = list(names)
    found = Trace({name: [] for name in names})
    containers = {name.rpartition(".")[0] for name in names}
    containers |= {outer for name in containers for outer in _outer(name)}
    mixes: dict[str, bool] = {}
    starts: list[Tensor] = []
    handles: list[Any] = []

    def see(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            # The tensors are held until the end, so no address is used twice.
            tensor = only_input(args, kwargs)
            found.inputs[name].append((tensor.detach(), tensor._version))
            if not _is_by_sequence(tensor, starts):
                found.by_position[name] = list(tensor.shape)

        return hook

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # At once: what comes after may write into the output.
            mixes[name] = mixes.get(name, False) or _mixes([*args, *kwargs.values()], output)

        return hook

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(partial(_start_graph, starts)))
    for name in names:
        handles.append(
            model.get_submodule(name).register_forward_pre_hook(see(name), with_kwargs=True)
        )
    for name in sorted(containers - {""}):
        handles.append(
            model.get_submodule(name).register_forward_hook(look(name), with_kwargs=True)
        )
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()  # in training mode, gradient checkpointing repeats a forward at each look
        tokens = torch.arange(NUM_SEQUENCES * NUM_TOKENS, device=device) % 4  # in any vocabulary
        tokens = tokens.view(NUM_SEQUENCES, NUM_TOKENS)
        with listening(dict.fromkeys(fused_experts(model).values(), _hear)):
            model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    all_mixing = {name for name, flag in mixes.items() if flag}
    with_mixing_inside = {outer for name in all_mixing for outer in _outer(name)}
    found.mixing = all_mixing - with_mixing_inside
    return found


def _outer(name: str) -> list[str]:
    """The names of all modules that a module is in, but for the model itself."""
    parts = name.split(".")
    return [".".join(parts[:k]) for k in range(1, len(parts))]


def _hear(routed: Routed) -> Tensor:
    return routed.outputs


def _start_graph(starts: list[Tensor], module: nn.Module, args: Any, output: Any) -> Any:
    if not isinstance(output, Tensor) or output.requires_grad:
        return output
    start = output.detach().requires_grad_()
    if start.shape[:2] == (NUM_SEQUENCES, NUM_TOKENS):
        starts.append(start)
    return start.clone()  # what follows may write into it


def _is_by_sequence(tensor: Tensor, starts: list[Tensor]) -> bool:
    """Whether a linear map's rows are the first sequence's positions, then the second's."""
    if tensor.ndim > 2:
        return tensor.shape[0] == NUM_SEQUENCES
    if tensor.shape[0] != NUM_SEQUENCES * NUM_TOKENS or not tensor.requires_grad or not starts:
        return True  # told by the number of rows, later
    first = tensor[:NUM_TOKENS].sum()
    gradients = torch.autograd.grad(first, starts, retain_graph=True, allow_unused=True)
    return not any(g is not None and bool(g[1:].any()) for g in gradients)


def _mixes(inputs: Iterable[Any], output: Any) -> bool:
    """Whether the last position of an output depends on an earlier one of an input."""
    results = output if isinstance(output, (tuple, list)) else [output]
    result = next((r for r in results if _has_positions(r)), None)
    if result is None:
        return False
    given = [tensor for tensor in inputs if _has_positions(tensor)]
    last = result[:, -1].sum()
    gradients = (
        torch.autograd.grad(last, given, retain_graph=True, allow_unused=True) if given else []
    )
    return any(g is not None and bool(g[:, :-1].any()) for g in gradients)


def _has_positions(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.ndim == 3
        and value.shape[1] == NUM_TOKENS
        and value.requires_grad
    )
