"""One forward of a small batch, and what it shows of a model's modules.

Knows nothing of MLPs: only which tensors pass through which linear map, and which modules make a
position depend on others.
"""

from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
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
# Relative rounding errors of a matrix product, computed in two ways.
_TOLERANCES = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 0.02,
    torch.bfloat16: 0.05,
}


@dataclass
class Trace:
    """What a forward shows of a model's modules.

    Attributes:
        inputs: {linear map or collection of experts: every tensor that it was called with, and the
            tensor's version at that time}.
        not_by_sequence: {linear map whose input's positions are not ordered sequence by sequence:
            the input's shape}.
        not_linear: Linear maps whose output is not the product of their weight and input.
        observable_experts: Collections of experts that computed by this package's implementation.
        mixing: Modules whose output at one position depends on their input at others, while no
            module in them has this property: attention, recurrence, convolution.
        pointwise: Modules whose output at each position depends on that position alone.
        looks_ahead: Whether logits at the first position depend on later tokens.
    """

    inputs: dict[str, list[tuple[Tensor, int]]] = field(default_factory=dict)
    not_by_sequence: dict[str, list[int]] = field(default_factory=dict)
    not_linear: set[str] = field(default_factory=set)
    observable_experts: set[str] = field(default_factory=set)
    mixing: set[str] = field(default_factory=set)
    pointwise: set[str] = field(default_factory=set)
    looks_ahead: bool = False


def few_tokens(model: nn.Module, device: torch.device) -> Batch:
    """A small batch of text: 2 sequences of 5 tokens, or fewer if the model takes no more.

    The two numbers differ, so that a tensor's shape shows which dimension is which.
    """
    num_tokens = min(5, context_length(model) or 5)
    num_sequences = 3 if num_tokens == 2 else 2
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    num_ids = min(4, getattr(embeddings, "num_embeddings", 4))
    tokens = np.arange(num_sequences * num_tokens).reshape(num_sequences, -1) % num_ids
    return collate([Sequence(k, ids, ids) for k, ids in enumerate(tokens)]).to(device)


@torch.enable_grad()
def trace(model: nn.Module, names: Iterable[str], task: Task, batch: Batch) -> Trace:
    """Runs a small batch through a model, and records what its modules show.

    Args:
        model: The model, frozen and in evaluation mode.
        names: Names of its linear maps and collections of experts.
        task: The task.
        batch: A batch whose number of sequences differs from its numbers of positions, which
            differ between modules that see other positions (of an encoder or a decoder).
    """
    recorder = _Recorder(model, names, batch)
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()  # in training mode, gradient checkpointing repeats a forward per autograd.grad
        # A compiled forward would run the hooks once, while it is compiled.
        with recorder.recording(), torch.compiler.set_stance("force_eager"):
            result, _ = task.loss_gradient(model, batch, _RULE)
    finally:
        for module, mode in modes:
            module.training = mode
    return recorder.finished(result)


class _Recorder:
    """Hooks that record in a `Trace` what a forward shows.

    Args:
        model: The model.
        names: Names of its linear maps and collections of experts.
        batch: The batch of the forward.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], batch: Batch) -> None:
        self._model, self._batch = model, batch
        self._trace = Trace({name: [] for name in names})
        self._shapes = {grid.shape for grid in batch.grids.values()}
        self._lengths = {num_positions for _, num_positions in self._shapes}
        self._starts: list[Tensor] = []  # embeddings, where the graph starts
        self._mixes: dict[str, bool] = {}  # whether a module mixes positions

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While it lasts, the forward is recorded."""
        names = list(self._trace.inputs)
        containers = {name.rpartition(".")[0] for name in names}
        containers |= {outer for name in containers for outer in _containers_of(name)}
        with ExitStack() as stack:
            for module in self._model.modules():
                if isinstance(module, nn.Embedding):
                    handle = module.register_forward_hook(self._start_graph)
                    stack.callback(handle.remove)
            for name in names:
                module = self._model.get_submodule(name)
                before = partial(self._record_input, name)
                handle = module.register_forward_pre_hook(before, with_kwargs=True)
                stack.callback(handle.remove)
                if describe(module) is not None:
                    after = partial(self._check_output, name)
                    handle = module.register_forward_hook(after, with_kwargs=True, prepend=True)
                    stack.callback(handle.remove)
            for name in sorted(containers - {""}):
                module = self._model.get_submodule(name)
                after = partial(self._record_mixing, name)
                handle = module.register_forward_hook(after, with_kwargs=True)
                stack.callback(handle.remove)
            experts = fused_experts(self._model)
            stack.enter_context(
                listening({e: partial(self._record_experts, name) for name, e in experts.items()})
            )
            yield

    def finished(self, result: Tensor) -> Trace:
        """The trace, given the tensor at which the backward would start: logits, or losses."""
        mixing = {name for name, mixes in self._mixes.items() if mixes}
        with_mixing_inside = {outer for name in mixing for outer in _containers_of(name)}
        self._trace.mixing = mixing - with_mixing_inside
        self._trace.pointwise = {name for name, mixes in self._mixes.items() if not mixes}
        self._trace.looks_ahead = result.ndim == 3 and _depends_on_later(result, self._starts)
        return self._trace

    def _start_graph(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Starts the autograd graph at an embedding's output."""
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        start = output.detach().requires_grad_()
        if tuple(start.shape[:2]) in self._shapes:
            self._starts.append(start)
        return start.clone()  # the model may write into it

    def _record_input(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Records a module's input, and whether it is ordered by sequence."""
        # The tensors are held until the end, so that no address is reused.
        tensor = only_input(args, kwargs)
        self._trace.inputs[name].append((tensor.detach(), tensor._version))
        grid = self._batch.grid(name)
        picked = None
        if in_expert_list(self._model, name):
            picked = picked_positions(tensor, grid.size)
        if not _is_by_sequence(tensor, grid.shape, self._starts, picked):
            self._trace.not_by_sequence[name] = list(tensor.shape)

    def _check_output(
        self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        """Compares a linear map's output with W x + b."""
        if not _is_linear(module, only_input(args, kwargs), output):
            self._trace.not_linear.add(name)

    def _record_experts(self, name: str, routed: Routed) -> Tensor:
        """Records that a collection computes by this package's implementation."""
        self._trace.observable_experts.add(name)
        return routed.outputs

    def _record_mixing(
        self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        """Records whether a module mixes positions."""
        # At once: later modules may write into the output.
        mixes = _mixes([*args, *kwargs.values()], output, self._lengths)
        if mixes is not None:
            self._mixes[name] = self._mixes.get(name, False) or mixes


def _containers_of(name: str) -> list[str]:
    """Names of all modules that contain a module, except the model itself."""
    parts = name.split(".")
    return [".".join(parts[:k]) for k in range(1, len(parts))]


def _is_by_sequence(
    tensor: Tensor, shape: tuple[int, int], starts: list[Tensor], picked: Tensor | None
) -> bool:
    """Whether an input holds the first sequence's positions, then the second's, and so on.

    Args:
        tensor: A linear map's input.
        shape: (B, T).
        starts: The embeddings, where the graph starts.
        picked: Flat indices of the input's positions [n], if they are not all.
    """
    num_sequences, num_positions = shape
    vectors = tensor.reshape(-1, tensor.shape[-1])
    if picked is None and tensor.ndim > 2:
        return tensor.shape[0] == num_sequences and len(vectors) == num_sequences * num_positions
    if picked is None and len(vectors) != num_sequences * num_positions:
        return True  # recognised later, by their number
    if not tensor.requires_grad or not starts:
        return False
    first = vectors[:num_positions] if picked is None else vectors[picked < num_positions]
    gradients = torch.autograd.grad(first.sum(), starts, retain_graph=True, allow_unused=True)
    return not any(gradient is not None and _is_nonzero(gradient[1:]) for gradient in gradients)


def _is_linear(module: nn.Module, tensor: Tensor, output: Any) -> bool:
    """Whether a linear map's output is W x + b; true where the weight cannot be read."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if type(weight) is not nn.Parameter or weight.dtype not in _TOLERANCES or weight.is_meta:
        return True  # quantised, sharded or computed: cannot be compared
    with torch.no_grad():
        weight_OI = weight.T if isinstance(module, Conv1D) else weight
        expected = torch.nn.functional.linear(tensor.to(weight.device), weight_OI, bias)
        if not isinstance(output, Tensor) or output.shape != expected.shape:
            return False
        error = (output.to(weight.device) - expected).double().norm()
        return not bool(error > _TOLERANCES[weight.dtype] * expected.double().norm())


def _depends_on_later(logits: Tensor, starts: list[Tensor]) -> bool:
    """Whether the logits at the first position depend on later tokens."""
    embeddings = [start for start in starts if start.shape[:2] == logits.shape[:2]]
    if not embeddings or not logits.requires_grad:
        return False
    first = logits[:, 0].sum()
    gradients = torch.autograd.grad(first, embeddings, retain_graph=True, allow_unused=True)
    return any(gradient is not None and _is_nonzero(gradient[:, 1:]) for gradient in gradients)


def _mixes(inputs: Iterable[Any], output: Any, lengths: Container[int]) -> bool | None:
    """Whether the last position of an output depends on an earlier position of an input.

    None if there is no output with positions, or it depends on no such input.
    """
    outputs = output if isinstance(output, (tuple, list)) else [output]
    by_position = next((value for value in outputs if _has_positions(value, lengths)), None)
    position_inputs = [tensor for tensor in inputs if _has_positions(tensor, lengths)]
    if by_position is None or not position_inputs:
        return None
    last = by_position[:, -1].sum()
    gradients = torch.autograd.grad(last, position_inputs, retain_graph=True, allow_unused=True)
    earlier = [gradient[:, :-1] for gradient in gradients if gradient is not None]
    return any(map(_is_nonzero, earlier)) if earlier else None


def _is_nonzero(gradient: Tensor) -> bool:
    """Whether a gradient is nonzero anywhere; NaN counts as zero: one NaN spreads to all."""
    return bool(gradient.nan_to_num(0).any())


def _has_positions(value: Any, lengths: Container[int]) -> bool:
    """Whether a value is a differentiable tensor [B, T, …], T being one of the lengths."""
    return (
        isinstance(value, Tensor)
        and value.ndim == 3
        and value.shape[1] in lengths
        and value.requires_grad
    )
