"""The two passes over `func`: covariances, their eigenbases, and Λ, by the package's own sums."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ekfac_dist.curvature.eigenbasis import decompose
from ekfac_dist.factors.factors import ModuleFactors
from ekfac_dist.fit.covariance import CovarianceSums
from ekfac_dist.fit.eigenbasis import Basis
from ekfac_dist.fit.refit import LambdaSums
from ekfac_dist.functional.batching import Batches
from ekfac_dist.functional.caches import MLPCache
from ekfac_dist.functional.calls import Calls, ModuleCapture
from ekfac_dist.functional.vectors import Layout
from ekfac_dist.models.capture.prepare import precisely


@dataclass(frozen=True)
class Fit:
    """Factors of every recorded module, and where the modules' parameters stand.

    Attributes:
        layout: All parameters.
        factors: By module name.
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
        func: Returns the losses of a batch.
        batches: The arguments.
        caches: The caches that `func` fills.
        model: The model whose parameters are meant, where it is known.
        progress: Whether to show progress.

    Raises:
        ConfigError, ModelError: `func` returns or records what cannot be used.
        NonFiniteError: NaN or infinity was met.
        DecompositionError: A factor could not be decomposed.
    """
    calls = Calls(func, batches, caches, model)
    with calls.recorded():
        covariance: CovarianceSums | None = None
        for rows in calls.each("covariance", progress):
            if covariance is None:
                covariance = CovarianceSums(calls.modules, calls.dtype, calls.device)
            _add(covariance, rows)
        assert covariance is not None
        covariance.fold()
        covariance.finish()
        bases = {}
        for name, (total,) in covariance.sums.items():
            basis = decompose(name, total, covariance.counts[name], calls.device)
            bases[name] = Basis([total.copy_(basis.eigenvectors)], basis.eigenvalues)
        lambdas = LambdaSums(
            calls.modules, bases, per_token=False, dtype=calls.dtype, device=calls.device
        )
        for rows in calls.each("refit", progress):
            _add(lambdas, rows)
        lambdas.fold()
    factors = {
        m.name: ModuleFactors(
            bases[m.output].eigenvectors,
            bases[m.input].eigenvectors,
            lambdas.sums[m.name] / batches.num_examples,
        )
        for m in calls.modules
    }
    return Fit(calls.layout, factors)


def _add(sums: CovarianceSums | LambdaSums, rows: Sequence[ModuleCapture]) -> None:
    with torch.no_grad(), precisely(rows[0].acts_Mi.device):
        for each in rows:
            if each.module.leads:
                sums.on_input(each.module, each.acts_Mi, each.positions)
        for each in rows:
            sums.on_gradient(each.module, each.grads_MO, each.positions)
