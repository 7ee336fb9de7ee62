"""The operations that a fit computes, two for each multiply-add, and the time that they take."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ekfac_dist.config import FactorsConfig
from ekfac_dist.curvature.blocks import block_sizes, num_elements
from ekfac_dist.curvature.costs import rotates_inputs, rotates_output_gradients
from ekfac_dist.fit.sizes import summed_elements
from ekfac_dist.models.modules import TrackedModule, factor_sizes

# Operations of one decomposition over n³, at the rate of float32 products: measured on 2 CPU cores,
# 1.2 s at n = 2048 and 190 GFLOP/s.
DECOMPOSITION_OPERATIONS = 26

# The part of the rate of float32 products that passes reach; measured, see tests/benchmarks/peers.
EFFICIENCY = 0.8


@dataclass(frozen=True)
class Operations:
    """Operations of all workers together, by stage."""

    covariance: float
    eigenbasis: float
    refit: float

    def seconds(self, rate: float, workers: int, *, sharded: bool) -> dict[str, float]:
        """The time of each stage.

        Args:
            rate: Operations a second of each worker, in float32 products.
            workers: W.
            sharded: Whether every worker decomposes its share of the factors.
        """
        return {
            "covariance": self.covariance / rate / workers / EFFICIENCY,
            "eigenbasis": self.eigenbasis / rate / (workers if sharded else 1),
            "refit": self.refit / rate / workers / EFFICIENCY,
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
    covariance = refit = eigenbasis = 0.0
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
        covariance += positions * model
        covariance += positions * 2 * outer_products
        if factors.refit == "none":
            continue
        refit += positions * model
        refit += num_sequences * 2 * _refit_multiply_adds(group, num_tokens, factors, routed)
    return Operations(covariance, eigenbasis, refit)


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
