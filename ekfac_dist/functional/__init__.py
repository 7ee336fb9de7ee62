"""EK-FAC for a function of one's own: any PyTorch MLP, not only a language model's.

    caches = cache_linears(model)                     # or MLPCache and manual: a rewritten forward
    ihvp = ihvp_at_x_ekfac(losses, x, y, batch_size=64, mlp_cache=caches, damping=1e-3)
    step = ihvp(gradient)                             # (F + λ)⁻¹ of a flat vector, or a list

It adds no mathematics: sums, decompositions and solves are the package's own.
"""

from ekfac_dist.functional.caches import KEY, MLPCache, manual
from ekfac_dist.functional.flattening import flatten_func, flatten_params
from ekfac_dist.functional.ihvp import ihvp_at_x_ekfac
from ekfac_dist.functional.linears import LinearCaches, cache_linears

__all__ = [
    "KEY",
    "LinearCaches",
    "MLPCache",
    "cache_linears",
    "flatten_func",
    "flatten_params",
    "ihvp_at_x_ekfac",
    "manual",
]
