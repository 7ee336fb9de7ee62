"""Fits EK-FAC factors in two passes over `func`: covariances and eigenbases, then Λ.

The running sums and the decomposition are those that language models are fitted with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ekfac_dist.curvature.eigenbasis import decompose
from ekfac_dist.curvature.float32_products import precisely
from ekfac_dist.curvature.split_matrices import whole
from ekfac_dist.factors.factors import ModuleFactors
from ekfac_dist.fit.covariance import CovarianceSums
from ekfac_dist.fit.eigenbasis import Basis
from ekfac_dist.fit.refit import LambdaSums
from ekfac_dist.functional.batching import Batches
from ekfac_dist.functional.caches import MLPCache
from ekfac_dist.functional.calls import Calls, ModuleCapture
from ekfac_dist.functional.vectors import Layout


@dataclass(frozen=True)
class Fit:
    """The fitted factors of every recorded module.

    Attributes:
        layout: The order and shapes of all parameters.
        factors: The factors, by module name.
    """

    layout: Layout
    factors: dict[str, ModuleFactors]


def fit_caches(
    func: Callable[..., Tensor],
    batches: Batches,
    caches: Sequence[MLPCache],
    model: nn.Module | None,
    *,
    progress: bool,
) -> Fit:
    """Fits EK-FAC factors to what `func` records (Grosse et al. 2023, eq. 16–20).

    Args:
        func: Takes a batch's arguments and returns its losses [examples · t].
        batches: The arguments, batch by batch; iterated twice.
        caches: The caches that `func` fills.
        model: The model whose parameters vectors have; None if it has to be found from the caches.
        progress: Whether to show progress.

    Raises:
        ConfigError: If `func` returns something other than such losses.
        ModelError: If what it records cannot be used.
        NonFiniteError: If a loss, an input or a gradient is NaN or infinite.
        DecompositionError: If a covariance cannot be decomposed.
    """
    calls = Calls(func, batches, caches, model)
    with calls.recorded():
        covariance: CovarianceSums | None = None
        for captures in calls.captures("covariance", progress):
            if covariance is None:
                covariance = CovarianceSums(calls.modules, calls.dtype, calls.device)
            _add_captures(covariance, captures)
        assert covariance is not None
        covariance.fold()
        covariance.finish()
        bases = {}
        for name, (sum_nn,) in covariance.sums.items():
            basis = decompose(name, sum_nn, covariance.counts[name], calls.device)
            bases[name] = Basis([sum_nn.copy_(basis.eigenvectors)], basis.eigenvalues)
        lambdas = LambdaSums(
            calls.modules, bases, per_token=False, dtype=calls.dtype, device=calls.device
        )
        for captures in calls.captures("refit", progress):
            _add_captures(lambdas, captures)
        lambdas.fold()
    factors = {
        module.name: ModuleFactors(
            whole(bases[module.output].eigenvectors),
            whole(bases[module.input].eigenvectors),
            lambdas.sums[module.name] / batches.num_examples,
        )
        for module in calls.modules
    }
    return Fit(calls.layout, factors)


def _add_captures(sums: CovarianceSums | LambdaSums, captures: Sequence[ModuleCapture]) -> None:
    with torch.no_grad(), precisely(captures[0].acts_Mi.device):
        for capture in captures:
            if capture.module.leads:
                sums.on_input(capture.module, capture.acts_Mi, capture.positions)
        for capture in captures:
            sums.on_gradient(capture.module, capture.grads_MO, capture.positions)
