"""Iterative solves of (G + D) x = q for many right-hand sides at once, over all modules together.

G is known by its products alone; (E + D)⁻¹ is the preconditioner, and its solution the start. A
vector is a matrix of each module, by name, and a block of Q of them is [Q, O, I] in each module.

    conjugate_gradients    one and the same G, each right-hand side with its own steps
    astra                  another sample of G at each step, momentum (arXiv 2507.14740, eq. 9)

Both hold four blocks of vectors, the right-hand sides among them. Inner products are summed in
float64. Where workers share out the products, each runs the same solve on the same numbers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ekfac_dist.errors import NonFiniteError

Vectors = Mapping[str, Tensor]
Precondition = Callable[[Vectors, Vectors], None]  # (of, into), which may be the same

HELD_BLOCKS = 4

# ASTRA's step size falls to this share after so many steps (arXiv 2507.14740, appendix F).
_DECAY, _DECAY_STEPS = 0.9, 100


class Product(Protocol):
    """Products of vectors with G + D."""

    def __call__(self, of: Vectors, into: Vectors, numbers: Sequence[int]) -> None:
        """Overwrites a block with products.

        Args:
            of: Vectors [Q, O, I] by module.
            into: Takes the products; others than those asked for may hold anything.
            numbers: Indices of the right-hand sides whose products are asked for.
        """


@dataclass(frozen=True)
class Solution:
    """Solutions of a block of right-hand sides.

    Attributes:
        vectors: x [Q, O, I] of each module.
        residuals: ‖q − (G + D) x‖ / ‖q‖ of the start and after each step [Q, steps + 1], float64;
            NaN after the step with which a right-hand side was finished.
    """

    vectors: Vectors
    residuals: Tensor


def conjugate_gradients(
    product: Product,
    precondition: Precondition,
    gradients: Vectors,
    *,
    iterations: int,
    tolerance: float,
) -> Solution:
    """Solves by conjugate gradients, preconditioned, from the preconditioner's solution.

    A right-hand side is finished when its residual is at most `tolerance`, or where pᵀ(G + D)p is
    not positive, which rounding alone can cause.

    Args:
        product: Products with G + D, symmetric and positive definite.
        precondition: Products with (E + D)⁻¹.
        gradients: q [Q, O, I] of each module; they are overwritten.
        iterations: Most steps.
        tolerance: Residual, over ‖q‖, at which a right-hand side is finished.

    Raises:
        NonFiniteError: If NaN or infinity appears.
    """
    norms = _norms(gradients)
    solution, directions, scratch = (_zeros_like(gradients) for _ in range(HELD_BLOCKS - 1))
    precondition(gradients, solution)
    residual, everyone = gradients, range(len(norms))
    product(solution, scratch, everyone)
    for name, values in residual.items():
        values -= scratch[name]
    precondition(residual, directions)
    decrease = _dots(residual, directions)
    history = [_relative(residual, norms)]
    is_active = (history[0] > tolerance) & (decrease > 0)
    while len(history) <= iterations and is_active.any():
        product(directions, scratch, is_active.nonzero().flatten().tolist())
        curvature = _dots(directions, scratch)
        is_active &= curvature > 0
        steps = torch.where(is_active, decrease / curvature, 0.0)
        _add_(solution, steps, directions, is_active)
        _add_(residual, -steps, scratch, is_active)
        relative = _relative(residual, norms)
        history.append(torch.where(is_active, relative, math.nan))
        _require_finite(relative, len(history) - 1)
        is_active &= relative > tolerance
        precondition(residual, scratch)
        next_decrease = _dots(residual, scratch)
        is_active &= next_decrease > 0
        factors = torch.where(is_active, next_decrease / decrease, 0.0)
        for name, values in directions.items():
            values.mul_(_as(factors, values)).add_(scratch[name])
        decrease = next_decrease
    return Solution(solution, torch.stack(history, 1))


def astra(
    product: Product,
    precondition: Precondition,
    gradients: Vectors,
    *,
    iterations: int,
    step_size: float,
    momentum: float,
) -> Solution:
    """X ← x − α m, m ← μ m + (E + D)⁻¹[(G_B + D) x − q], with a fresh sample G_B in each step.

    arXiv 2507.14740, eq. 9; α falls by a tenth every 100 steps. Residuals are those of the step's
    sample before the step, and the last one is of a sample of its own.

    Args:
        product: Products with G_B + D, another sample in each call.
        precondition: Products with (E + D)⁻¹.
        gradients: q [Q, O, I] of each module.
        iterations: Number of steps.
        step_size: α.
        momentum: μ.

    Raises:
        NonFiniteError: If it diverges.
    """
    norms, everyone = _norms(gradients), range(len(next(iter(gradients.values()))))
    solution, change, scratch = (_zeros_like(gradients) for _ in range(HELD_BLOCKS - 1))
    precondition(gradients, solution)
    history: list[Tensor] = []
    for step in range(iterations + 1):
        product(solution, scratch, everyone)
        for name, values in scratch.items():
            values -= gradients[name]
        history.append(_relative(scratch, norms))
        _require_finite(history[-1], step)
        if step == iterations:
            break
        precondition(scratch, scratch)
        rate = step_size * _DECAY ** (step // _DECAY_STEPS)
        for name, values in solution.items():
            change[name].mul_(momentum).add_(scratch[name])
            values.sub_(change[name], alpha=rate)
    return Solution(solution, torch.stack(history, 1))


def _zeros_like(vectors: Vectors) -> Vectors:
    return {name: torch.zeros_like(values) for name, values in vectors.items()}


def _dots(one: Vectors, other: Vectors) -> Tensor:
    """Inner products of two blocks, float64 on the host [Q]; one matrix is converted at a time."""
    totals: Tensor | None = None
    for name, values in one.items():
        pairs = zip(values, other[name], strict=True)
        dots = [torch.dot(a.double().flatten(), b.double().flatten()) for a, b in pairs]
        totals = torch.stack(dots) if totals is None else totals + torch.stack(dots)
    assert totals is not None
    return totals.cpu()


def _norms(vectors: Vectors) -> Tensor:
    return _dots(vectors, vectors).sqrt()


def _relative(residual: Vectors, norms: Tensor) -> Tensor:
    """‖r‖ / ‖q‖ [Q]; 0 where q is 0."""
    return torch.where(norms > 0, _norms(residual) / norms, 0.0)


def _add_(sums: Vectors, factors: Tensor, vectors: Vectors, is_active: Tensor) -> None:
    """Adds a multiple of each vector; those that are not active may hold anything."""
    for number in is_active.nonzero().flatten().tolist():
        for name, values in sums.items():
            values[number].add_(vectors[name][number], alpha=float(factors[number]))


def _as(factors: Tensor, values: Tensor) -> Tensor:
    """Factors [Q] as [Q, 1, 1], of the values' dtype and device."""
    return factors.to(values)[:, None, None]


def _require_finite(residuals: Tensor, step: int) -> None:
    if not residuals.isfinite().all():
        raise NonFiniteError(
            f"The refinement of query gradients diverged: NaN or infinity after {step} steps. Use "
            "a larger damping.value, or with refine.method astra a smaller refine.step_size."
        )
