"""`ihvp_at_x_ekfac`: inverse-Hessian-vector products of a function, by EK-FAC."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ekfac_dist.curvature import kronecker
from ekfac_dist.curvature.damping import Damping
from ekfac_dist.curvature.products import GRADIENT_BYTES
from ekfac_dist.errors import ConfigError
from ekfac_dist.functional.batching import Cuts
from ekfac_dist.functional.caches import MLPCache
from ekfac_dist.functional.fitting import Fit, fit_caches
from ekfac_dist.models.capture.prepare import precisely
from ekfac_dist.models.modules import TrackedModule


def ihvp_at_x_ekfac(
    func: Callable[..., Tensor],
    *x: Any,
    in_dims: Sequence[int | None] | int | None = None,
    batch_size: int = 1,
    max_iter: int | None = None,
    mlp_cache: MLPCache | Sequence[MLPCache] | None = None,
    damping: float = 0.0,
    model: nn.Module | None = None,
    progress: bool = False,
) -> Callable[..., Any]:
    """Inverse-Hessian-vector products by EK-FAC, at some data (George et al. 2018).

    What is inverted is F + λ for each recorded linear map alone, F being the Fisher, or
    Gauss–Newton, matrix of `func`'s losses in EK-FAC's approximation (Grosse et al. 2023, eq. 20):

        (F + λ)⁻¹ V = Q_S [(Q_Sᵀ V Q_A) ⊘ (Λ + λ)] Q_Aᵀ
        A = 1/M Σ a aᵀ = Q_A diag(λ_A) Q_Aᵀ,   S = 1/M Σ g gᵀ = Q_S diag(λ_S) Q_Sᵀ
        Λ = 1/N Σ_n (Q_Sᵀ G_n Q_A)∘²,          G_n = Σ_t g_t a_tᵀ

    over N examples and the M rows that pass through the map; a is its input, with a 1 appended
    where it has a bias, and g the gradient of the example's summed losses with respect to its
    hidden vector. Eigenvectors stand in the columns of Q. (Where EK-FAC is written with them in
    rows, Q_Sᵀ [(Q_S V Q_Aᵀ) ⊘ …] Q_A, its Q is the transpose of this one.)

    `func` is called twice for each batch, once for the covariances and once for Λ. Gradients of
    parameters are not kept, nor their `grad` touched; dropout is off meanwhile, which it has to be
    for v too; the model comes back as it was. The first call is looked at more closely: an
    example's losses may not depend on other examples, nor a recorded weight on anything but its
    linear map (be it tied, or decayed in the loss).

    Args:
        func: Takes `x`, or a batch of it, and returns losses of shape [batch_size · t]: the t
            losses of an example, one after another, are one sequence, whose loss is their sum. t
            is the same in every call. The labels in it decide which Fisher this is: drawn from the
            model's own predictions, the true one; the data's, the empirical one. (Labels that are
            drawn beforehand are the same in both calls. A model that is sure of itself may need
            several for each example, which is then repeated.)
        *x: Arguments of `func`.
        in_dims: Of each argument the dimension that runs over examples, or None for one that is not
            cut, such as parameters. By default the first dimension of each, except the flat
            parameters of a function that `flatten_func` decorated.
        batch_size: Examples in a batch; the last may have fewer. Larger ones are much faster, and
            give the same to rounding. If nothing is cut, how many examples the one call has.
        max_iter: Use at most this many batches; None for all.
        mlp_cache: The cache, or caches, that a call of `func` fills. (One that is given after `x`
            by position is taken for it.)
        damping: λ, absolute and the same for every linear map, 0 or more.
        model: The model whose parameters v has, in the order of `model.parameters()`. By default
            the model of `flatten_func`; or that of `cache_linears`; or else the modules that caches
            are attached to, in the caches' order.
        progress: Show progress on standard error.

    Returns:
        A function. `ihvp(v)` applies the inverse at `x`; `ihvp(x, v)`, with a tuple x, fits at that
        x first, for this once. Either takes another `damping=`, and with `relative=True` a multiple
        of each map's mean(Λ) (0.1 is what Grosse et al. 2023 use), for this once. v is

        - a flat tensor [P] in the order of the parameters, or a stack of them [..., P]; or
        - a list or tuple of tensors of the parameters' shapes, of all of them or of the recorded
          ones, in that order; a bias beside its weight, or as the last column of a matrix outputs ×
          (inputs + 1). Leading dimensions stack several; or
        - a mapping of such tensors by the parameters' names.

        The result has v's structure, in the wider of v's dtype and the factors', which are float64
        for a float64 model and float32 for any other; gradients flow through it. Where no cache
        records a parameter it is zero, and the first time a warning names such parameters.

    Raises:
        ConfigError: An argument, v, or what `func` returns, cannot be what was meant; or λ is 0
            where Λ has zeros, so that there is no inverse (told when it is applied).
        ModelError: The caches recorded nothing, or what cannot be used; or a hidden vector received
            no gradient.
        NonFiniteError: NaN or infinity in a loss, an input, a gradient, or v.
        DecompositionError: A covariance could not be decomposed.
    """
    if not callable(func):
        raise ConfigError(f"func is a {type(func).__name__}; it must be a function.")
    chosen = _damping(damping, relative=False)
    x, caches = _caches(x, mlp_cache)
    _require_arguments(x, in_dims)
    flattened = getattr(func, "flattened", None)
    model = getattr(flattened, "model", None) if model is None else model
    uncut: int | None = getattr(flattened, "param_num", None)
    cuts = Cuts.of(len(x), in_dims, batch_size, max_iter, uncut)

    def fit_at(arguments: Sequence[Any]) -> Fit:
        return fit_caches(func, cuts.batches(arguments), caches, model, progress=progress)

    at_x = fit_at(x)
    warned = False

    def ihvp(*arguments: Any, damping: float | None = None, relative: bool = False) -> Any:
        """`ihvp(v)` or `ihvp(x, v)`; see `ihvp_at_x_ekfac`."""
        nonlocal warned
        used = chosen if damping is None else _damping(damping, relative)
        if len(arguments) not in (1, 2, len(x) + 1):
            raise ConfigError(
                f"The function was called with {len(arguments)} arguments; call it as ihvp(v), or "
                "as ihvp(x, v) with a tuple x."
            )
        *other, v = arguments
        fitted = at_x
        if other:
            given = other[0] if len(other) == 1 else other
            fitted = fit_at(tuple(given) if isinstance(given, (tuple, list)) else (given,))
        result, zeros = fitted.layout.solve(v, partial(_solve, fitted, used))
        if zeros and not warned:
            warned = True
            warnings.warn(
                f"No cache records {', '.join(zeros)}: the result is zero there. Only the "
                "influence of the recorded linear maps is considered.",
                stacklevel=2,
            )
        return result

    return ihvp


def _solve(fitted: Fit, damping: Damping, module: TrackedModule, matrix_OI: Tensor) -> Tensor:
    """(F + λ)⁻¹ of one module's part of a vector, or of a stack of them, a few at a time."""
    factors = fitted.factors[module.name]
    dtype = torch.promote_types(matrix_OI.dtype, factors.lambda_OI.dtype)
    factors = factors.to(matrix_OI.device, dtype)
    try:
        value = damping.absolute(module.name, factors.lambda_OI)
        damped_OI = kronecker.damped(factors.lambda_OI, value)
    except ConfigError as error:
        raise ConfigError(f"Module {module.name}: {error}") from error
    stack_kOI = matrix_OI.to(dtype).reshape(-1, *matrix_OI.shape[-2:])
    room = max(1, GRADIENT_BYTES // (damped_OI.nbytes or 1))
    with precisely(matrix_OI.device):
        solved = [
            kronecker.solve(part, factors.blocks_OO, factors.blocks_II, damped_OI)
            for part in stack_kOI.split(room)
        ]
    return (torch.cat(solved) if len(solved) > 1 else solved[0]).view(matrix_OI.shape)


def _damping(value: Any, relative: bool) -> Damping:
    single = isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point()
    return Damping(value.item() if single else value, relative)


def _require_arguments(x: tuple[Any, ...], in_dims: Any) -> None:
    if len(x) == 1 and isinstance(x[0], (tuple, list)) and in_dims is None:
        raise ConfigError(
            f"x is one {type(x[0]).__name__} of {len(x[0])}; give func's arguments one by one, "
            "ihvp_at_x_ekfac(func, *x, …), or in_dims if it is one argument."
        )
    for number, value in enumerate(x):
        if isinstance(value, Tensor) and value.is_inference():
            raise ConfigError(
                f"x[{number}] was made under torch.inference_mode, so nothing can be "
                "differentiated through it; make it outside, or clone it there."
            )


def _caches(x: tuple[Any, ...], mlp_cache: Any) -> tuple[tuple[Any, ...], list[MLPCache]]:
    """Arguments and caches; the caches may stand behind the arguments."""

    def is_cache(value: Any) -> bool:
        some = isinstance(value, (list, tuple)) and len(value) > 0
        return isinstance(value, MLPCache) or (some and all(map(is_cache, value)))

    behind = [value for value in x if is_cache(value)]
    if behind:
        if mlp_cache is not None or len(behind) > 1 or not is_cache(x[-1]):
            raise ConfigError(
                "Caches are given more than once, or amid the arguments of func; give them once, "
                "as mlp_cache."
            )
        x, mlp_cache = x[:-1], behind[0]
    if not is_cache(mlp_cache):
        given = "nothing" if mlp_cache is None else f"a {type(mlp_cache).__name__}"
        raise ConfigError(
            f"mlp_cache is {given}; give the MLPCache that func's model fills, or a list of them "
            "(cache_linears(model) makes one)."
        )
    caches = [mlp_cache] if isinstance(mlp_cache, MLPCache) else list(mlp_cache)
    if len({id(cache) for cache in caches}) < len(caches):
        raise ConfigError("mlp_cache has a cache more than once; give each once.")
    return x, caches
