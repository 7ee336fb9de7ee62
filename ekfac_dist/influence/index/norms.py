"""Norms of whole training gradients at any damping, from those at a few.

What an index keeps of a gradient is not all of it, so norms are computed when it is made, for each
module and these λ, multiples of mean(Λ) of the module:

    s(λ) = ⟨G, (F + λ)⁻¹ G⟩        and        d(λ) = ‖(F + λ)⁻¹ G‖² = −s′(λ)

Stored are mean(Λ)·s and mean(Λ)²·d, which are of the size of the gradients however small Λ is.

Between them log s and log d are interpolated over log λ, by cubic polynomials: both are smooth, for
s is a mean of 1/(Λ + λ). Halfway between two, a norm was off by 1 or 2 % (SmolLM2-135M), and by up
to 3 % where Λ spreads over ten decades.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ekfac_dist.errors import ConfigError
from ekfac_dist.models.modules import TrackedModule

# Multiples of mean(Λ). Each costs a share of the pass that makes an index.
DAMPINGS = tuple(10.0**k for k in range(-4, 3))


def mean_of(lambda_OI: Tensor) -> float:
    """mean(Λ) of a module, which dampings are multiples of; 1 where Λ is zero everywhere."""
    return float(lambda_OI.mean(dtype=torch.float64)) or 1.0


def interpolated(norms_nd: Tensor, damping: float) -> Tensor:
    """One of the two sums at some damping [n], float64, from those at `DAMPINGS`.

    Args:
        norms_nd: The sums at `DAMPINGS`, 0 or more [n, dampings].
        damping: λ as a multiple of mean(Λ), within them.
    """
    points = torch.tensor(DAMPINGS, dtype=torch.float64).log()
    at = torch.tensor(damping, dtype=torch.float64).log()
    after = int(torch.searchsorted(points, at).clamp(2, len(points) - 2))
    four = slice(after - 2, after + 2)
    near = points[four]
    weights = []
    for k in range(4):
        others = torch.cat([near[:k], near[k + 1 :]])
        weights.append(((at - others) / (near[k] - others)).prod())
    values_n4 = norms_nd[:, four].double()
    logs_n = values_n4.clamp(min=torch.finfo(torch.float64).tiny).log() @ torch.stack(weights)
    return torch.where((values_n4 > 0).all(1), logs_n.exp(), 0.0)


def require_known(
    modules: Iterable[TrackedModule], means: Mapping[str, float], damping: Mapping[str, float]
) -> None:
    """Refuses a damping for which norms are not known.

    Args:
        modules: The modules.
        means: mean(Λ) of each module, as of `mean_of`.
        damping: Absolute λ of each module.

    Raises:
        ConfigError: If a λ is outside those that norms are stored for.
    """
    least, most = DAMPINGS[0] * (1 - 1e-6), DAMPINGS[-1] * (1 + 1e-6)
    for module in modules:
        multiple = damping[module.name] / means[module.name]
        if not least <= multiple <= most:
            raise ConfigError(
                f"The damping of module {module.name} is {multiple:.3g} times its mean(Λ); an "
                f"index knows norms of gradients for {DAMPINGS[0]:.2g} to {DAMPINGS[-1]:.3g} "
                "times. Give such a damping, or scores.normalize: none; without an index norms are "
                "known for any."
            )


def at_dampings(
    norms_nmkd: Tensor,
    modules: Sequence[TrackedModule],
    means: Mapping[str, float],
    damping: Mapping[str, float],
) -> Tensor:
    """Σ over modules of s and of d at their dampings [2, n], float64.

    Args:
        norms_nmkd: The stored norms, mean(Λ)·s and mean(Λ)²·d [n, modules, 2, dampings].
        modules: The modules, in the norms' order.
        means: mean(Λ) of each module, as of `mean_of`.
        damping: Absolute λ of each module; see `require_known`.
    """
    sums_2n = torch.zeros(2, len(norms_nmkd), dtype=torch.float64)
    for m, module in enumerate(modules):
        mean = means[module.name]
        for k in range(2):
            stored_nd = norms_nmkd[:, m, k]
            sums_2n[k] += interpolated(stored_nd, damping[module.name] / mean) / mean ** (k + 1)
    return sums_2n
