"""What has to be true of `func` for its hidden vectors to tell the Fisher, seen from one call."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ekfac_dist.errors import ModelError
from ekfac_dist.functional.recording import Use, rounding
from ekfac_dist.models.capture.prepare import precisely
from ekfac_dist.models.modules import CONV1D, TrackedModule


def require_apart(
    losses: Tensor, size: int, modules: Sequence[TrackedModule], edges: Sequence[GradientEdge]
) -> None:
    """The first example's losses depend on no other example's rows.

    Args:
        losses: [size · t], differentiable.
        size: Examples in the batch.
        modules: The recorded modules.
        edges: Where their hidden vectors' gradients arrive.

    Raises:
        ModelError: They do, in the named module.
    """
    if size == 1:
        return
    first = losses[: len(losses) // size].sum()
    gradients = torch.autograd.grad(first, edges, retain_graph=True, allow_unused=True)
    for module, gradient in zip(modules, gradients, strict=True):
        if gradient is None or not gradient.isfinite().all():
            continue  # told by others
        rows = gradient.reshape(-1, module.num_outputs)
        if rows[len(rows) // size :].any():
            raise ModelError(
                f"The first example's losses depend on rows of module {module.name} that are other "
                f"examples', by their order (hidden vectors of shape {list(gradient.shape)}, a "
                f"batch of {size}). Examples must be the first dimension, of losses too, and be "
                "computed apart from each other; else take batch_size=1."
            )


def require_whole(
    module: TrackedModule, use: Use, gradient: Tensor, of_weight: Tensor | None
) -> None:
    """The linear map is W a + b, and W's gradient is Σ g aᵀ: nothing else is done with W.

    Args:
        module: The module.
        use: Its call.
        gradient: Of the summed losses with respect to its output.
        of_weight: The same with respect to its weight; None if that takes none.

    Raises:
        ModelError: It is not so.
    """
    if not use.is_linear:
        raise ModelError(
            f"Module {module.name} is a {type(use.module).__name__} whose output is not its weight "
            "times its input, plus its bias: the weight is masked or computed on the way, or more "
            "is done. Do not record that module."
        )
    if of_weight is None:
        return
    with torch.no_grad(), precisely(gradient.device):
        of_weight_OI = of_weight.mT if module.kind == CONV1D else of_weight
        dtype = torch.promote_types(of_weight.dtype, torch.float32)
        acts = use.input[0].detach().reshape(-1, module.num_inputs).to(dtype)
        grads = gradient.reshape(-1, module.num_outputs).to(dtype)
        difference = (grads.T @ acts - of_weight_OI).norm()
        allowed = rounding(use.input[0], use.weight, gradient) * grads.norm() * acts.norm()
        if difference > allowed:
            raise ModelError(
                f"The weight of module {module.name} has a gradient beside that of its linear map "
                "(Σ g aᵀ): it is used elsewhere too, tied or decayed in the losses. Leave that out "
                "of func, or do not record that module."
            )
