"""The operations that a fit computes, two for each multiply-add, and the time that they take."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ekfac_dist.config import FactorsConfig
from ekfac_dist.curvature.blocks import block_sizes, num_elements
from ekfac_dist.curvature.costs import rotates_inputs, rotates_output_gradients
from ekfac_dist.fit.rates import DECOMPOSITION_OPERATIONS, Rates
from ekfac_dist.fit.sizes import summed_elements
from ekfac_dist.models.modules import TrackedModule, factor_sizes


@dataclass(frozen=True)
class Operations:
    """Operations of all workers together, by stage.

    Attributes:
        model: Of the model's forward and backward in the covariance pass.
        outer_products: Of the sums of the covariance pass.
        eigenbasis: Of the decompositions.
        model_again: Of the model in the refit.
        rotations: Of everything else in the refit.
    """

    model: float
    outer_products: float
    eigenbasis: float
    model_again: float
    rotations: float

    @property
    def by_stage(self) -> dict[str, float]:
        """Operations of each stage."""
        return {
            "covariance": self.model + self.outer_products,
            "eigenbasis": self.eigenbasis,
            "refit": self.model_again + self.rotations,
        }

    def seconds(self, rates: Rates, workers: int, *, sharded: bool) -> dict[str, float]:
        """The time of each stage.

        Args:
            rates: Operations a second of each worker.
            workers: W.
            sharded: Whether every worker decomposes its share of the factors.
        """
        covariance = self.model / rates.model + self.outer_products / rates.outer_products
        refit = self.model_again / rates.model + self.rotations / rates.float32
        return {
            "covariance": covariance / workers,
            "eigenbasis": self.eigenbasis / rates.decompositions / (workers if sharded else 1),
            "refit": refit / workers,
        }


def operations(
    groups: Sequence[Sequence[TrackedModule]],
    operations_per_token: Sequence[float],
    factors: FactorsConfig,
    num_sequences: int,
    num_tokens: int,
    routed: Mapping[str, float],
) -> Operations:
    """The operations of a whole fit.

    Args:
        groups: Groups of modules, one pair of passes each.
        operations_per_token: Those of the model's own forward and backward, for each group.
        factors: What is fitted.
        num_sequences: N.
        num_tokens: Positions of each sequence.
        routed: The part of the positions that a module sees, by its name, if not all.
    """
    all_model = all_outer_products = eigenbasis = model_again = rotations = 0.0
    positions = num_sequences * num_tokens
    for group, model in zip(groups, operations_per_token, strict=True):
        sizes, parts = factor_sizes(group), {}
        for module in group:
            parts[module.input] = parts[module.output] = routed.get(module.name, 1.0)
        eigenbasis += DECOMPOSITION_OPERATIONS * sum(
            n**3 for size in sizes.values() for n in block_sizes(size, factors.blocks)
        )
        outer_products = sum(
            summed_elements(n, factors.blocks) * parts[factor] for factor, n in sizes.items()
        )
        all_model += positions * model
        all_outer_products += positions * 2 * outer_products
        if factors.refit == "none":
            continue
        model_again += positions * model
        rotations += num_sequences * 2 * _refit_multiply_adds(group, num_tokens, factors, routed)
    return Operations(all_model, all_outer_products, eigenbasis, model_again, rotations)


def _refit_multiply_adds(
    group: Sequence[TrackedModule],
    num_tokens: int,
    factors: FactorsConfig,
    routed: Mapping[str, float],
) -> float:
    """Multiply-adds of one sequence in the refit."""
    readers: dict[str, list[TrackedModule]] = {}
    for module in group:
        readers.setdefault(module.input, []).append(module)
    per_token = factors.refit == "per_token"
    multiply_adds = 0.0
    for modules in readers.values():
        tokens = num_tokens * routed.get(modules[0].name, 1.0)
        size, output_sizes = modules[0].input_size, [m.num_outputs for m in modules]
        rows = math.ceil(tokens)
        by_rows = per_token or rotates_inputs(rows, 1, output_sizes)
        squares = num_elements(size, factors.blocks)
        multiply_adds += (tokens if by_rows else sum(output_sizes)) * squares
        for num_outputs in output_sizes:
            by_rows = per_token or rotates_output_gradients(rows, 1, size)
            squares = num_elements(num_outputs, factors.blocks)
            multiply_adds += (tokens if by_rows else size) * squares + tokens * num_outputs * size
    return multiply_adds
