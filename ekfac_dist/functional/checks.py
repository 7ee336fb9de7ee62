"""Checks, in the first call of `func`, that its hidden vectors' gradients give the Fisher."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ekfac_dist.curvature.float32_products import precisely
from ekfac_dist.errors import ModelError
from ekfac_dist.functional.recording import LinearCall, relative_tolerance
from ekfac_dist.models.modules import CONV1D, TrackedModule


def require_independent_examples(
    losses: Tensor, size: int, modules: Sequence[TrackedModule], edges: Sequence[GradientEdge]
) -> None:
    """Checks that the first example's losses do not depend on other examples' positions.

    Args:
        losses: The batch's losses [size · t], differentiable.
        size: Number of examples in the batch.
        modules: The recorded modules.
        edges: Gradient edge of each module's hidden vector.

    Raises:
        ModelError: If they do; the message names the module.
    """
    if size == 1:
        return
    first_loss = losses[: len(losses) // size].sum()
    gradients = torch.autograd.grad(first_loss, edges, retain_graph=True, allow_unused=True)
    for module, gradient in zip(modules, gradients, strict=True):
        if gradient is None or not gradient.isfinite().all():
            continue  # other checks report these
        grads = gradient.reshape(-1, module.num_outputs)
        if grads[len(grads) // size :].any():
            raise ModelError(
                f"The first example's losses depend on rows of module {module.name} that are other "
                f"examples', by their order (hidden vectors of shape {list(gradient.shape)}, a "
                f"batch of {size}). Examples must be the first dimension, of losses too, and be "
                "computed apart from each other; else take batch_size=1."
            )


def require_plain_linear(
    module: TrackedModule,
    call: LinearCall,
    output_gradient: Tensor,
    weight_gradient: Tensor | None,
) -> None:
    """Checks that the linear map is W a + b, and that W's gradient is Σ g aᵀ.

    Otherwise W is used elsewhere too, and its gradient is not the one that is fitted.

    Args:
        module: The recorded module.
        call: Its call.
        output_gradient: Gradient of the summed losses with respect to its output [..., O].
        weight_gradient: The same with respect to its weight, in the weight's shape; None if the
            weight takes no gradient.

    Raises:
        ModelError: If the output is not W a + b, or the weight has another gradient.
    """
    if not call.is_linear:
        raise ModelError(
            f"Module {module.name} is a {type(call.module).__name__} whose output is not its "
            "weight times its input, plus its bias: the weight is masked or computed on the way, "
            "or more is done. Do not record that module."
        )
    if weight_gradient is None:
        return
    inputs, _ = call.input
    with torch.no_grad(), precisely(output_gradient.device):
        gradient_OI = weight_gradient.mT if module.kind == CONV1D else weight_gradient
        dtype = torch.promote_types(weight_gradient.dtype, torch.float32)
        acts = inputs.detach().reshape(-1, module.num_inputs).to(dtype)
        grads = output_gradient.reshape(-1, module.num_outputs).to(dtype)
        difference = (grads.T @ acts - gradient_OI).norm()
        tolerance = relative_tolerance(inputs, call.weight, output_gradient)
        if difference > tolerance * grads.norm() * acts.norm():
            raise ModelError(
                f"The weight of module {module.name} has a gradient beside that of its linear map "
                "(Σ g aᵀ): it is used elsewhere too, tied or decayed in the losses. Leave that out "
                "of func, or do not record that module."
            )
