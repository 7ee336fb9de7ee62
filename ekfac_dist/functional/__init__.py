"""EK-FAC for any differentiable function of a PyTorch MLP, not only for language models.

    caches = cache_linears(model)                     # or MLPCache and manual, in a forward
    ihvp = ihvp_at_x_ekfac(losses, x, y, batch_size=64, mlp_cache=caches, damping=1e-3)
    step = ihvp(gradient)                             # (F + λ)⁻¹ of a flat vector, or a list

It adds no mathematics: covariances, decompositions and solves are those of the other packages.

    linears, caches     hooks or a rewritten forward record (input, hidden vector) of linear maps
    recording           observes those linear maps while `func` runs
    pairs               identifies each recorded pair's module and parameters
    calls, checks       call `func` on each batch, take gradients, and check both
    fitting, ihvp       fit the factors in two passes; apply the inverse
    vectors             the forms that a vector may have
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
