"""The head of a causal language model, for some positions at a time: logits are never held whole.

A causal language model is a body, whose output is a hidden state [H] at each position, and what
follows: the head, a product with a matrix [V, H], and perhaps a scale or a soft cap. V is large, so
the logits of a batch take more memory than all of its activations. Here the model runs once with
the head at a single position; then what follows the body runs for a chunk of the labelled positions
at a time, forward and backward, and only the gradient with respect to the hidden states is kept:

    body ─> hidden states ─┬─ chunk 1 ─> head ─> softmax − onehot ─> its gradient ─┬─> backward
                           └─ chunk 2 ─> …                                         ┘

What follows the body is the model's own `forward`, called with the body replaced by something that
gives the chunk's hidden states. That this computes the same is tried on the model at hand.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ekfac_dist.data.batches import Batch
from ekfac_dist.errors import ModelError
from ekfac_dist.models.capture.labelled_logits import (
    DATA_LABELS,
    LabelledLogits,
    LogitsInChunks,
)
from ekfac_dist.models.capture.labels import (
    GRADIENT_SCALES,
    LabelLosses,
    LabelRule,
    LossGradient,
    softmax_positions,
    wide_dtype,
)
from ekfac_dist.models.capture.tasks import CAUSAL_LM, CausalLM
from ekfac_dist.models.modules import EXPERT, TrackedModule
from ekfac_dist.models.sharding import is_sharded

# Elements of the logits that are held at a time. The head's product is slow for few positions.
CHUNK_ELEMENTS = 2**24


class CausalLMInChunks(CausalLM):
    """Causal language modelling with the head computed for a chunk of positions at a time.

    Args:
        model: The prepared model that the task is for.
        body: Name of the module whose output is the hidden states that the head reads.
        chunk_elements: Elements of the logits that are held at a time.
    """

    def __init__(self, model: nn.Module, body: str, chunk_elements: int = CHUNK_ELEMENTS) -> None:
        self.body = body
        self._model, self._chunk_elements = model, chunk_elements

    @property
    def name(self) -> str:
        """That of the task that it computes."""
        return CAUSAL_LM.name

    def loss_gradient(
        self, model: nn.Module, batch: Batch, rule: LabelRule
    ) -> tuple[Tensor, LossGradient]:
        """Runs a batch.

        Args:
            model: The model.
            batch: The batch, on the model's device.
            rule: Where the labels come from.

        Returns:
            The hidden states [B, T, H], at which the backward starts, and the gradient of the
            summed losses with respect to them.

        Raises:
            ModelError: If the body does not give one hidden state for each label.
        """
        labels = batch.inputs["labels"]
        output, hidden, num_classes = self._run_body(batch)
        self._check_hidden(hidden, labels)
        losses = LabelLosses(labels, batch, rule, num_classes)
        flat_hidden = hidden.detach().flatten(0, -2)
        flat_ids = batch.inputs["input_ids"].flatten()
        flat_gradient = torch.zeros_like(flat_hidden)
        scale, logit_bytes = 1.0, 0
        for numbers, places in losses.chunks(self._chunk_elements // num_classes):
            hidden_nH = flat_hidden[places].detach().requires_grad_()
            logits_nV = self._logits(output, hidden_nH, flat_ids[places])
            logit_bytes = max(logit_bytes, logits_nV.nbytes)
            scale = GRADIENT_SCALES.get(logits_nV.dtype, 1.0)
            residual_nV = _residual(losses, numbers, places, logits_nV.detach(), scale)
            with torch.autocast(hidden.device.type, enabled=False):  # meant for forwards
                (gradient_nH,) = torch.autograd.grad(logits_nV, hidden_nH, residual_nV)
            flat_gradient[places] = gradient_nH
        return hidden, losses.finished(flat_gradient.view_as(hidden), scale, logit_bytes)

    def labelled_logits(self, model: nn.Module, batch: Batch) -> LabelledLogits:
        """Runs a batch's body; see `Task.labelled_logits`.

        Raises:
            ModelError: If the body does not give one hidden state for each label.
        """
        labels = batch.inputs["labels"]
        output, hidden, num_classes = self._run_body(batch)
        self._check_hidden(hidden, labels)
        flat_ids = batch.inputs["input_ids"].flatten()
        return LogitsInChunks(
            hidden,
            LabelLosses(labels, batch, DATA_LABELS, num_classes),
            lambda hidden_nH, places: self._logits(output, hidden_nH, flat_ids[places]),
            self._chunk_elements // num_classes,
        )

    def _check_hidden(self, hidden: Tensor, labels: Tensor) -> None:
        if hidden.shape[:-1] != labels.shape:
            raise ModelError(
                f"{type(self._model).__name__} gave hidden states of shape {list(hidden.shape)} "
                f"for labels of shape {list(labels.shape)}."
            )

    def logits_at(self, model: nn.Module, batch: Batch, places: Tensor) -> Tensor:
        """Logits [n, V] at some positions of a batch; see `CausalLM.logits_at`."""
        output, hidden, _ = self._run_body(batch)
        ids = batch.inputs["input_ids"].flatten()[places]
        return self._logits(output, hidden.detach().flatten(0, -2)[places], ids)

    def _run_body(self, batch: Batch) -> tuple[Any, Tensor, int]:
        """The body's output, the hidden states in it, and the number of classes."""
        outputs: list[Any] = []

        def keep(module: nn.Module, args: Any, output: Any) -> Any:
            outputs.append(output)
            return with_hidden(output, hidden_of(output)[:, :1])

        handle = self._model.get_submodule(self.body).register_forward_hook(keep)
        try:
            inputs = {name: field for name, field in batch.inputs.items() if name != "labels"}
            few_logits = self._model(**inputs, use_cache=False).logits
        finally:
            handle.remove()
        if len(outputs) != 1:
            raise ModelError(f"{self.body} was called {len(outputs)} times in one forward.")
        return outputs[0], hidden_of(outputs[0]), few_logits.shape[-1]

    def _logits(self, output: Any, hidden_nH: Tensor, ids_n: Tensor) -> Tensor:
        """What follows the body, for n positions: [n, V].

        Args:
            output: The body's output for the whole batch.
            hidden_nH: Hidden states of the positions.
            ids_n: Their tokens.
        """
        constant = with_hidden(output, hidden_nH[None])
        stand_ins = {self._model.get_submodule(self.body): lambda *args, **kwargs: constant}
        if is_sharded(self._model):
            head = output_embeddings(self._model)
            for module in (self._model, head):
                if isinstance(module, FSDPModule):
                    module.unshard()
            stand_ins[head] = head.forward  # hooks belong to the forward of the whole batch
        not_noted = torch.autograd.graph.saved_tensors_hooks(_same, _same)  # freed with the chunk
        with _replaced(self._model, stand_ins), not_noted:
            # `forward` itself, for the same reason.
            result: Any = self._model.forward(input_ids=ids_n[None], use_cache=False)
        return result.logits[0]


@contextmanager
def _replaced(
    model: nn.Module, stand_ins: Mapping[nn.Module, Callable[..., Any]]
) -> Iterator[None]:
    """While it lasts, calling some of a model's modules calls other functions, without hooks."""
    places = [
        (container._modules, name, child)
        for container in model.modules()
        for name, child in container._modules.items()
        if child is not None and child in stand_ins
    ]
    try:
        for children, name, child in places:
            children[name] = _StandIn(child, stand_ins[child])
        yield
    finally:
        for children, name, child in places:
            children[name] = child


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _StandIn(nn.Module):
    """Has a module's attributes, and calls another function."""

    def __init__(self, original: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__.update(_original=original, _function=function)  # no submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_original"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self._function(*args, **kwargs)


def _residual(
    losses: LabelLosses,
    numbers: range,
    places: slice | Tensor,
    logits_nV: Tensor,
    scale: float,
) -> Tensor:
    """`scale` × (softmax − onehot(label)) of a chunk's positions [n, V], in the logits' dtype."""
    residual_nV = torch.empty_like(logits_nV)
    step, wide = softmax_positions(logits_nV), wide_dtype(logits_nV)
    for first in range(0, len(numbers), step):
        part = slice(first, min(first + step, len(numbers)))
        scores = logits_nV[part].to(wide)
        in_place = residual_nV.dtype == wide
        residual = residual_nV[part] if in_place else torch.empty_like(scores)
        losses.differentiate(numbers[part], _part_of(places, part), scores, residual)
        if scale != 1.0:
            residual *= scale
        if not in_place:
            residual_nV[part] = residual.to(residual_nV.dtype)
    return residual_nV


def _part_of(places: slice | Tensor, part: slice) -> slice | Tensor:
    """A part of flat indices."""
    if isinstance(places, Tensor):
        return places[part]
    return slice(places.start + part.start, places.start + part.stop)


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a body's output."""
    return output if isinstance(output, Tensor) else output[0]


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """A body's output with other hidden states."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    return dataclasses.replace(output, last_hidden_state=hidden)


def output_embeddings(model: nn.Module) -> Any:
    """The matrix [V, H] that is multiplied with hidden states; None if a model has none."""
    return getattr(_without_adapters(model), "get_output_embeddings", lambda: None)()


def _without_adapters(model: nn.Module) -> Any:
    return getattr(model, "get_base_model", lambda: model)()


def logit_bytes(model: nn.Module, modules: Sequence[TrackedModule], logits: Tensor) -> int:
    """Bytes of the logits that are held at a time, as far as the model's structure shows.

    Args:
        model: A model, which may be on the meta device.
        modules: The tracked modules.
        logits: Logits of a whole step.
    """
    chunk = max(CHUNK_ELEMENTS, logits.shape[-1]) * logits.element_size()
    return min(chunk, logits.nbytes) if bodies(model, modules) else logits.nbytes


def bodies(model: nn.Module, modules: Sequence[TrackedModule]) -> list[str]:
    """Names of modules whose output may be what the head reads; the outermost first.

    All tracked modules are in each of them.
    """
    inner, head = _without_adapters(model), output_embeddings(model)
    if head is None:
        return []
    candidates = [getattr(inner, "base_model", None), getattr(inner, "get_decoder", lambda: None)()]
    return [
        name
        for name, module in model.named_modules()
        if any(module is candidate for candidate in candidates)
        and head not in module.modules()
        and all(
            (m.fused[0] if m.kind == EXPERT else m.name).startswith(f"{name}.") for m in modules
        )
    ]
