"""`ihvp_at_x_ekfac`: inverse-Hessian-vector products of a function's losses, by EK-FAC."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ekfac_dist.curvature import kronecker
from ekfac_dist.curvature.damping import Damping
from ekfac_dist.curvature.float32_products import precisely
from ekfac_dist.errors import ConfigError
from ekfac_dist.functional.batching import Batching
from ekfac_dist.functional.caches import MLPCache
from ekfac_dist.functional.fitting import Fit, fit_caches
from ekfac_dist.models.modules import TrackedModule

# Bytes of the matrices that are solved for at a time.
STACK_BYTES = 2**28


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
    """Inverse-Hessian-vector products by EK-FAC, fitted at given data (George et al. 2018).

    F + λ is inverted for each recorded linear map separately, F being EK-FAC's approximation of the
    Fisher (or Gauss–Newton) matrix of `func`'s losses (Grosse et al. 2023, eq. 20):

        (F + λ)⁻¹ V = Q_S [(Q_Sᵀ V Q_A) ⊘ (Λ + λ)] Q_Aᵀ
        A = 1/M Σ a aᵀ = Q_A diag(λ_A) Q_Aᵀ,   S = 1/M Σ g gᵀ = Q_S diag(λ_S) Q_Sᵀ
        Λ = 1/N Σ_n (Q_Sᵀ G_n Q_A)∘²,          G_n = Σ_t g_t a_tᵀ

    over N examples and the M positions at which the map is applied; a is its input, with a 1
    appended where it has a bias, and g the gradient of the example's summed losses with respect to
    its hidden vector. Eigenvectors are the columns of Q. (Where EK-FAC is written with eigenvectors
    in rows, Q_Sᵀ [(Q_S V Q_Aᵀ) ⊘ …] Q_A, its Q is the transpose of this one.)

    `func` is called twice for each batch, once for the covariances and once for Λ. Gradients of
    parameters are not kept, and their `grad` is not touched. Dropout is off during the calls, as it
    has to be when v is computed; the model is left unchanged. In the first call it is checked that
    an example's losses do not depend on other examples, and that recorded weights are used in their
    linear maps only (neither tied, nor decayed in the loss).

    Args:
        func: Takes `x`, or a batch of it, and returns losses of shape [batch_size · t]: the t
            losses of an example, one after another, are one sequence, whose loss is their sum. t
            is the same in every call. The labels that it uses decide which Fisher this is: drawn
            from the model's own predictions, the true Fisher; the data's, the empirical one.
            (Labels drawn beforehand are the same in both calls. If the model is very certain of its
            predictions, draw several labels for each example, and repeat the example for each.)
        *x: Arguments of `func`.
        in_dims: Each argument's dimension over examples, or None for an argument that is not cut,
            such as parameters. By default the first dimension of each, except the flat parameters
            of a function that `flatten_func` decorated.
        batch_size: Examples in a batch; the last may have fewer. Larger batches are much faster,
            and give the same result to rounding. If nothing is cut, the number of examples in the
            single call.
        max_iter: Use at most this many batches; None for all.
        mlp_cache: The cache, or caches, that a call of `func` fills. (May also be given by position
            after `x`.)
        damping: λ, absolute and the same for every linear map, 0 or more.
        model: The model whose parameters v has, in the order of `model.parameters()`. By default
            the model of `flatten_func`, else that of `cache_linears`, else the modules that caches
            are attached to, in the caches' order.
        progress: Whether to show progress on standard error.

    Returns:
        A function. `ihvp(v)` applies the inverse fitted at `x`; `ihvp(x, v)`, with a tuple x, first
        fits at that x, for this call only. Both accept another `damping=` for this call, and with
        `relative=True` it is a multiple of each map's mean(Λ) (Grosse et al. 2023 use 0.1). v is

        - a flat tensor [P] in the order of the parameters, or a stack of them [..., P]; or
        - a list or tuple of tensors of the parameters' shapes, for all parameters or for the
          recorded ones, in that order; a bias follows its weight, or is the last column of a matrix
          outputs × (inputs + 1). Leading dimensions stack several vectors; or
        - a mapping of such tensors by the parameters' names.

        The result has v's structure, in the wider of v's dtype and the factors', which is float64
        for a float64 model and float32 for any other; gradients flow through it. It is zero for
        parameters that no cache records, which a warning names once.

    Raises:
        ConfigError: If an argument or v has the wrong type or shape, `func` returns something other
            than such losses, or, when the inverse is applied, λ is 0 and Λ has zeros.
        ModelError: If the caches recorded nothing, or something that cannot be used, or a hidden
            vector received no gradient.
        NonFiniteError: If a loss, an input, a gradient or v is NaN or infinite.
        DecompositionError: If a covariance cannot be decomposed.
    """
    if not callable(func):
        raise ConfigError(f"func is a {type(func).__name__}; it must be a function.")
    default_damping = _one_damping(damping, relative=False)
    x, caches = _split_off_caches(x, mlp_cache)
    _require_arguments(x, in_dims)
    flattened = getattr(func, "flattened", None)
    model = getattr(flattened, "model", None) if model is None else model
    uncut: int | None = getattr(flattened, "param_num", None)
    batching = Batching.of(len(x), in_dims, batch_size, max_iter, uncut)

    def fit_at(arguments: Sequence[Any]) -> Fit:
        return fit_caches(func, batching.batches(arguments), caches, model, progress=progress)

    return _ihvp_function(fit_at(x), fit_at, len(x), default_damping)


def _ihvp_function(
    fit_at_x: Fit,
    fit_at: Callable[[Sequence[Any]], Fit],
    num_arguments: int,
    default_damping: Damping,
) -> Callable[..., Any]:
    """The function that `ihvp_at_x_ekfac` returns.

    Args:
        fit_at_x: Factors fitted at `x`.
        fit_at: Fits factors at other arguments of `func`.
        num_arguments: Number of arguments of `func`.
        default_damping: The damping of calls that give none.
    """
    has_warned = False

    def ihvp(*arguments: Any, damping: float | None = None, relative: bool = False) -> Any:
        """`ihvp(v)` or `ihvp(x, v)`; see `ihvp_at_x_ekfac`."""
        nonlocal has_warned
        call_damping = default_damping if damping is None else _one_damping(damping, relative)
        if len(arguments) not in (1, 2, num_arguments + 1):
            raise ConfigError(
                f"The function was called with {len(arguments)} arguments; call it as ihvp(v), or "
                "as ihvp(x, v) with a tuple x."
            )
        *other_x, v = arguments
        fit = fit_at_x
        if other_x:
            x = other_x[0] if len(other_x) == 1 else other_x
            fit = fit_at(tuple(x) if isinstance(x, (tuple, list)) else (x,))
        result, zeros = fit.layout.solve(v, partial(_solve_module, fit, call_damping))
        if zeros and not has_warned:
            has_warned = True
            warnings.warn(
                f"No cache records {', '.join(zeros)}: the result is zero there. Only the "
                "influence of the recorded linear maps is considered.",
                stacklevel=2,
            )
        return result

    return ihvp


def _solve_module(fit: Fit, damping: Damping, module: TrackedModule, matrix_OI: Tensor) -> Tensor:
    """(F + λ)⁻¹ V for one module's part V [..., O, I] of a vector, a few matrices at a time."""
    factors = fit.factors[module.name]
    dtype = torch.promote_types(matrix_OI.dtype, factors.lambda_OI.dtype)
    factors = factors.to(matrix_OI.device, dtype)
    try:
        absolute = damping.absolute(module.name, factors.lambda_OI)
        damped_OI = kronecker.damped(factors.lambda_OI, absolute)
    except ConfigError as error:
        raise ConfigError(f"Module {module.name}: {error}") from error
    stack_kOI = matrix_OI.to(dtype).reshape(-1, *matrix_OI.shape[-2:])
    num_at_once = max(1, STACK_BYTES // (damped_OI.nbytes or 1))
    with precisely(matrix_OI.device):
        solved = [
            kronecker.solve(part_kOI, factors.blocks_OO, factors.blocks_II, damped_OI)
            for part_kOI in stack_kOI.split(num_at_once)
        ]
    return (torch.cat(solved) if len(solved) > 1 else solved[0]).view(matrix_OI.shape)


def _one_damping(value: Any, relative: bool) -> Damping:
    """One damping for all linear maps, from a number or a tensor with a single value."""
    is_scalar = isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point()
    return Damping(value.item() if is_scalar else value, relative)


def _require_arguments(x: tuple[Any, ...], in_dims: Any) -> None:
    if len(x) == 1 and isinstance(x[0], (tuple, list)) and in_dims is None:
        raise ConfigError(
            f"x is one {type(x[0]).__name__} of {len(x[0])}; give func's arguments one by one, "
            "ihvp_at_x_ekfac(func, *x, …), or in_dims if it is one argument."
        )
    for index, value in enumerate(x):
        if isinstance(value, Tensor) and value.is_inference():
            raise ConfigError(
                f"x[{index}] was made under torch.inference_mode, so nothing can be "
                "differentiated through it; make it outside, or clone it there."
            )


def _split_off_caches(x: tuple[Any, ...], mlp_cache: Any) -> tuple[tuple[Any, ...], list[MLPCache]]:
    """The arguments of `func` and the caches, which may be the last argument or `mlp_cache`."""

    def is_cache(value: Any) -> bool:
        is_nonempty = isinstance(value, (list, tuple)) and len(value) > 0
        return isinstance(value, MLPCache) or (is_nonempty and all(map(is_cache, value)))

    positional = [value for value in x if is_cache(value)]
    if positional:
        if mlp_cache is not None or len(positional) > 1 or not is_cache(x[-1]):
            raise ConfigError(
                "Caches are given more than once, or amid the arguments of func; give them once, "
                "as mlp_cache."
            )
        x, mlp_cache = x[:-1], positional[0]
    if not is_cache(mlp_cache):
        kind = "nothing" if mlp_cache is None else f"a {type(mlp_cache).__name__}"
        raise ConfigError(
            f"mlp_cache is {kind}; give the MLPCache that func's model fills, or a list of them "
            "(cache_linears(model) makes one)."
        )
    caches = [mlp_cache] if isinstance(mlp_cache, MLPCache) else list(mlp_cache)
    if len({id(cache) for cache in caches}) < len(caches):
        raise ConfigError("mlp_cache has a cache more than once; give each once.")
    return x, caches
