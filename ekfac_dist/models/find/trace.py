"""One forward of a few tokens, and what it shows of a model's modules.

Knows nothing of MLPs: only what passed through which linear map, and which modules let a position
see others.
"""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ekfac_dist.data.batches import Batch
from ekfac_dist.data.sequences import Sequence, collate
from ekfac_dist.models.capture.expert_lists import in_expert_list, picked_positions
from ekfac_dist.models.capture.experts import Routed, fused_experts, listening
from ekfac_dist.models.capture.labels import LabelRule
from ekfac_dist.models.capture.tasks import Task
from ekfac_dist.models.load.pretrained import context_length
from ekfac_dist.models.modules import describe, only_input

_RULE = LabelRule("data", 0, 0)
# Relative errors that two ways to compute one product may have.
_TOLERANCES = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 0.02,
    torch.bfloat16: 0.05,
}


@dataclass
class Trace:
    """What a forward showed.

    Attributes:
        inputs: Of each linear map, or collection of experts, every tensor that it was called with,
            and its version then.
        by_position: Linear maps whose rows are not sequence by sequence, and their inputs' shape.
        not_linear: Linear maps whose output is not their weight's product with their input.
        heard: Collections of experts that computed by our implementation.
        mixing: Modules whose output at one position depends on their input at others, though none
            of the modules in them is such a one: where attention, or a recurrence, happens.
        pointwise: Modules with an output at each position that depends on that position alone.
        looks_ahead: Whether what comes out first depends on the tokens after it.
    """

    inputs: dict[str, list[tuple[Tensor, int]]] = field(default_factory=dict)
    by_position: dict[str, list[int]] = field(default_factory=dict)
    not_linear: set[str] = field(default_factory=set)
    heard: set[str] = field(default_factory=set)
    mixing: set[str] = field(default_factory=set)
    pointwise: set[str] = field(default_factory=set)
    looks_ahead: bool = False


def few_tokens(model: nn.Module, device: torch.device) -> Batch:
    """2 sequences of 5 tokens: unequal numbers, so that a shape tells which is which."""
    num_tokens = min(5, context_length(model) or 5)
    num_sequences = 3 if num_tokens == 2 else 2
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    vocabulary = min(4, getattr(embeddings, "num_embeddings", 4))
    tokens = np.arange(num_sequences * num_tokens).reshape(num_sequences, -1) % vocabulary
    return collate([Sequence(k, row, row) for k, row in enumerate(tokens)]).to(device)


@torch.enable_grad()
def trace(model: nn.Module, names: Iterable[str], task: Task, batch: Batch) -> Trace:
    """Runs a few sequences through a model.

    Args:
        model: The model, frozen and in evaluation mode.
        names: Names of its linear maps and collections of experts.
        task: What is asked of it.
        batch: Of another number of sequences than positions, and with other numbers of positions
            for modules that see others.
    """
    names = list(names)
    shapes = {key: grid.shape for key, grid in batch.grids.items()}
    found = Trace({name: [] for name in names})
    containers = {name.rpartition(".")[0] for name in names}
    containers |= {outer for name in containers for outer in _outer(name)}
    mixes: dict[str, bool] = {}
    starts: list[Tensor] = []
    lengths = {shape[1] for shape in shapes.values()}
    handles: list[Any] = []

    def see(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            # The tensors are held until the end, so no address is used twice.
            tensor = only_input(args, kwargs)
            found.inputs[name].append((tensor.detach(), tensor._version))
            picked = None
            if in_expert_list(model, name):
                picked = picked_positions(tensor, batch.grid(name).size)
            if not _is_by_sequence(tensor, batch.grid(name).shape, starts, picked):
                found.by_position[name] = list(tensor.shape)

        return hook

    def check(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not _is_linear(module, only_input(args, kwargs), output):
                found.not_linear.add(name)

        return hook

    def hear(name: str) -> Any:
        def listen(routed: Routed) -> Tensor:
            found.heard.add(name)
            return routed.outputs

        return listen

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # At once: what comes after may write into the output.
            mixing = _mixes([*args, *kwargs.values()], output, lengths)
            if mixing is not None:
                mixes[name] = mixes.get(name, False) or mixing

        return hook

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(partial(_start_graph, starts, shapes)))
    for name in names:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(see(name), with_kwargs=True))
        if describe(module) is not None:
            hook = check(name)
            handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
    for name in sorted(containers - {""}):
        handles.append(
            model.get_submodule(name).register_forward_hook(look(name), with_kwargs=True)
        )
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()  # in training mode, gradient checkpointing repeats a forward at each look
        listeners = {experts: hear(name) for name, experts in fused_experts(model).items()}
        # A compiled forward would look once at what it is to look at every time.
        with listening(listeners), torch.compiler.set_stance("force_eager"):
            result, _ = task.loss_gradient(model, batch, _RULE)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    all_mixing = {name for name, flag in mixes.items() if flag}
    with_mixing_inside = {outer for name in all_mixing for outer in _outer(name)}
    found.mixing = all_mixing - with_mixing_inside
    found.pointwise = {name for name, flag in mixes.items() if not flag}
    found.looks_ahead = result.ndim == 3 and _depends_on_later(result, starts)
    return found


def _outer(name: str) -> list[str]:
    """The names of all modules that a module is in, but for the model itself."""
    parts = name.split(".")
    return [".".join(parts[:k]) for k in range(1, len(parts))]


def _start_graph(
    starts: list[Tensor],
    shapes: Mapping[str, tuple[int, int]],
    module: nn.Module,
    args: Any,
    output: Any,
) -> Any:
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return output
    start = output.detach().requires_grad_()
    if tuple(start.shape[:2]) in shapes.values():
        starts.append(start)
    return start.clone()  # what follows may write into it


def _is_by_sequence(
    tensor: Tensor, shape: tuple[int, int], starts: list[Tensor], picked: Tensor | None
) -> bool:
    """Whether a linear map's rows are the first sequence's positions, then the next one's.

    Args:
        tensor: What it is called with.
        shape: (B, T).
        starts: The embeddings that the graph starts at.
        picked: The rows' own flat positions, where they are not all.
    """
    num_sequences, num_positions = shape
    rows = tensor.reshape(-1, tensor.shape[-1])
    if picked is None and tensor.ndim > 2:
        return tensor.shape[0] == num_sequences and len(rows) == num_sequences * num_positions
    if picked is None and len(rows) != num_sequences * num_positions:
        return True  # told by the number of rows, later
    if not tensor.requires_grad or not starts:
        return False
    first = rows[:num_positions] if picked is None else rows[picked < num_positions]
    gradients = torch.autograd.grad(first.sum(), starts, retain_graph=True, allow_unused=True)
    return not any(g is not None and _is_some(g[1:]) for g in gradients)


def _is_linear(module: nn.Module, tensor: Tensor, output: Any) -> bool:
    """Whether what came out is W x + b, where the weight can be read."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if type(weight) is not nn.Parameter or weight.dtype not in _TOLERANCES or weight.is_meta:
        return True  # quantised, sharded or computed: nothing to compare with
    with torch.no_grad():
        weight_OI = weight.T if isinstance(module, Conv1D) else weight
        expected = torch.nn.functional.linear(tensor.to(weight.device), weight_OI, bias)
        if not isinstance(output, Tensor) or output.shape != expected.shape:
            return False
        error = (output.to(weight.device) - expected).double().norm()
        return not bool(error > _TOLERANCES[weight.dtype] * expected.double().norm())


def _depends_on_later(logits: Tensor, starts: list[Tensor]) -> bool:
    """Whether the logits at the first position depend on a later token."""
    given = [start for start in starts if start.shape[:2] == logits.shape[:2]]
    if not given or not logits.requires_grad:
        return False
    first = logits[:, 0].sum()
    gradients = torch.autograd.grad(first, given, retain_graph=True, allow_unused=True)
    return any(g is not None and _is_some(g[:, 1:]) for g in gradients)


def _mixes(inputs: Iterable[Any], output: Any, lengths: Container[int]) -> bool | None:
    """Whether the last position of an output depends on an earlier one of an input.

    None where there is no output at each position, or no input that it depends on.
    """
    results = output if isinstance(output, (tuple, list)) else [output]
    result = next((r for r in results if _has_positions(r, lengths)), None)
    given = [tensor for tensor in inputs if _has_positions(tensor, lengths)]
    if result is None or not given:
        return None
    last = result[:, -1].sum()
    gradients = torch.autograd.grad(last, given, retain_graph=True, allow_unused=True)
    reached = [gradient for gradient in gradients if gradient is not None]
    return any(_is_some(g[:, :-1]) for g in reached) if reached else None


def _is_some(gradient: Tensor) -> bool:
    """Whether there is any gradient; NaN, which a NaN anywhere makes everywhere, shows nothing."""
    return bool(gradient.nan_to_num(0).any())


def _has_positions(value: Any, lengths: Container[int]) -> bool:
    return (
        isinstance(value, Tensor)
        and value.ndim == 3
        and value.shape[1] in lengths
        and value.requires_grad
    )
