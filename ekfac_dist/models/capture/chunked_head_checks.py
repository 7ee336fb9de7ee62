"""Whether the head in chunks gives what whole logits give, tried on the model at hand."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ekfac_dist.data.batches import Batch
from ekfac_dist.models.capture.chunked_head import (
    CausalLMInChunks,
    bodies,
    hidden_of,
    with_hidden,
)
from ekfac_dist.models.capture.experts import fused_experts, listening
from ekfac_dist.models.capture.labels import LabelRule, LossGradient
from ekfac_dist.models.capture.packing import attending_within
from ekfac_dist.models.capture.prepare import start_graph
from ekfac_dist.models.capture.rotary import changing_embeddings, reset_frequencies
from ekfac_dist.models.capture.tasks import CAUSAL_LM
from ekfac_dist.models.modules import TrackedModule, is_quantised, linear_modules
from ekfac_dist.models.sharding import forget_forward, reshard

# Relative change of the gradient's norm that rounding explains.
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 0.03}


def in_chunks(
    model: nn.Module, modules: Sequence[TrackedModule], batch: Batch
) -> CausalLMInChunks | None:
    """The task with a chunked head, if that gives losses, and their gradient, of whole logits.

    Args:
        model: A prepared model.
        modules: The tracked modules; none of them may be part of what follows the body.
        batch: Sequences to try it with, on the model's device.

    Returns:
        None if the model has no such body, or something else is computed between body and logits,
        such as a hook of the caller's.
    """
    for body in bodies(model, modules):
        if _is_exact(model, body, batch):
            return CausalLMInChunks(model, body)
    return None


def _is_exact(model: nn.Module, body: str, batch: Batch) -> bool:
    """Whether the head in chunks gives the losses, and their gradient, of the whole logits."""
    rule = LabelRule("data", 0, 0)
    try:
        with _as_in_a_pass(model, batch):
            expected, logits, whole = _whole_gradient(model, body, batch, rule)
            few = max(1, whole.num_labels // 3) * logits.shape[-1]
            _, chunked = CausalLMInChunks(model, body, few).loss_gradient(model, batch, rule)
    except torch.OutOfMemoryError:
        raise  # a pass would run out of memory, too
    except Exception:  # a model that fails so is not run so
        forget_forward(model)
        return False
    rounding = ROUNDING[logits.dtype]
    if chunked.gradient.shape != expected.shape or chunked.scale != whole.scale:
        return False
    return all(
        (one - other).norm() <= rounding * other.norm()
        for one, other in (
            (chunked.gradient.double(), expected.double()),
            (chunked.losses, whole.losses),
        )
    )


def _whole_gradient(
    model: nn.Module, body: str, batch: Batch, rule: LabelRule
) -> tuple[Tensor, Tensor, LossGradient]:
    """The gradient with respect to the hidden states [B, T, H], by autograd from whole logits.

    Returns:
        The gradient, the logits, and the losses with their gradient with respect to the logits.
    """
    hidden: list[Tensor] = []

    def start_at_hidden(module: nn.Module, args: Any, output: Any) -> Any:
        hidden.append(hidden_of(output).detach().requires_grad_())
        return with_hidden(output, hidden[0])

    handle = model.get_submodule(body).register_forward_hook(start_at_hidden)
    try:
        logits, result = CAUSAL_LM.loss_gradient(model, batch, rule)
    finally:
        handle.remove()
    with torch.autocast(logits.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(logits, hidden, result.gradient)
    return gradient, logits, result


@contextmanager
def _as_in_a_pass(model: nn.Module, batch: Batch) -> Iterator[None]:
    """While it lasts, the model computes as it does in a pass, without hooks on its modules."""
    reset_frequencies(changing_embeddings(model))
    experts = dict.fromkeys(fused_experts(model).values(), lambda routed: routed.outputs)
    with ExitStack() as stack:
        if any(map(is_quantised, linear_modules(model).values())):
            # A forward without a graph may pack quantised weights for good.
            for module in model.modules():
                if isinstance(module, nn.Embedding):
                    stack.callback(module.register_forward_hook(start_graph).remove)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(listening(experts))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(attending_within(model, batch))
        yield
    reshard(model)
