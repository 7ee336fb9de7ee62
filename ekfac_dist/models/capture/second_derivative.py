"""A model whose backward can be differentiated, for as long as that is needed.

Fused attention kernels have no second derivative, and gradient checkpointing would compute layers
again for each backward. So attention is computed by products of matrices, from which autograd
derives all it needs, and no module checkpoints its activations.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ekfac_dist.models.capture.packing import attention_configs

# Attention of `transformers` that is computed by torch's own operations; "sdpa" by the kernel that
# is chosen here.
_DIFFERENTIABLE = ("eager", "sdpa")


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """While it lasts, a model's attention has second derivatives, and nothing is checkpointed.

    Args:
        model: A prepared model; it comes back as it was.
    """
    configs = attention_configs(model)
    before = [config._attn_implementation for config in configs]
    supports_sdpa = all(getattr(m, "_supports_sdpa", True) for m in model.modules())
    checkpointing = [
        m for m in model.modules() if m.training and getattr(m, "gradient_checkpointing", False)
    ]
    try:
        for config in configs:
            if config._attn_implementation not in _DIFFERENTIABLE:
                config._attn_implementation = "sdpa" if supports_sdpa else "eager"
        for module in checkpointing:
            module.training = False
        with sdpa_kernel([SDPBackend.MATH]):
            yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
        for module in checkpointing:
            module.training = True
