"""Sizes of what a fit holds and writes, in elements and bytes, from its modules' sizes alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ekfac_dist.config import FactorsConfig
from ekfac_dist.curvature import covariance, long_sums
from ekfac_dist.curvature.blocks import block_sizes, num_elements
from ekfac_dist.curvature.costs import stored_rows
from ekfac_dist.curvature.halves import NUM_VECTORS
from ekfac_dist.curvature.score_change import num_sampled
from ekfac_dist.models.modules import TrackedModule, factor_sizes


@dataclass(frozen=True)
class WorkerShare:
    """The most that any worker has of the data; it decides which running sums get a second level.

    Attributes:
        steps: Number of batches.
        sequences: Number of sequences in them.
        positions: Number of their counted positions.
    """

    steps: int
    sequences: int
    positions: int

    def of(self, shard: int) -> "WorkerShare":
        """What an owner sums: the shares of as many workers as share one copy of the factors."""
        return WorkerShare(shard * self.steps, shard * self.sequences, shard * self.positions)

    def is_long(self, positions_per_term: int) -> bool:
        """Whether sums over positions have enough terms to be flushed into a second level.

        Args:
            positions_per_term: Positions that make one term; the last of a step may have fewer.
        """
        return self.positions / positions_per_term + self.steps >= long_sums.FLUSH_AFTER


def itemsize(factors: FactorsConfig) -> int:
    """Bytes of one element of a running sum."""
    return int(getattr(torch, factors.accumulate).itemsize)


def square_elements(group: Iterable[TrackedModule], factors: FactorsConfig) -> list[int]:
    """Elements of each factor of a group, as a covariance or as eigenvectors."""
    return [num_elements(n, factors.blocks) for n in factor_sizes(group).values()]


def lambda_elements(group: Iterable[TrackedModule]) -> list[int]:
    """Elements O·I of Λ of each module of a group."""
    return [module.num_outputs * module.input_size for module in group]


def summed_elements(size: int, blocks: int) -> int:
    """Elements of a covariance that are stored: the lower triangles of its blocks, in block rows.

    Args:
        size: n.
        blocks: Number of blocks on its diagonal.
    """
    total = 0
    for n in block_sizes(size, blocks):
        rows = stored_rows(n)
        for start in range(0, n, rows):
            end = min(start + rows, n)
            total += (end - start) * end
    return total


def second_level_bytes(
    group: Sequence[TrackedModule], factors: FactorsConfig, share: WorkerShare, *, on_cpu: bool
) -> dict[str, int]:
    """Bytes of the second levels of a worker's running sums, by pass; see `LongSums`.

    Args:
        group: The modules of a pair of passes.
        factors: What is fitted.
        share: The worker's share of the data.
        on_cpu: Whether it computes on the CPU.
    """
    levels = {"covariance": 0, "refit": 0}
    if factors.accumulate != "float32":
        return levels
    device, bytes_each = torch.device("cpu" if on_cpu else "cuda"), torch.float32.itemsize
    with_bias = {module.input for module in group if module.bias}
    for factor, size in factor_sizes(group).items():
        columns = block_sizes(size, factors.blocks)
        columns[-1] -= factor in with_bias
        is_long = share.is_long(covariance.outer_product_positions_per_term(columns, device))
        levels["covariance"] += bytes_each * summed_elements(size, factors.blocks) * is_long
    for module in group:
        if factors.refit == "per_token":
            sides = (module.num_outputs, module.input_size)
            is_long = share.is_long(long_sums.positions_per_term(min(sides), device))
        else:
            is_long = factors.refit != "none" and share.sequences >= long_sums.FLUSH_AFTER
        levels["refit"] += bytes_each * module.num_outputs * module.input_size * is_long
    return levels


def halves_bytes(group: Sequence[TrackedModule], factors: FactorsConfig) -> dict[str, int]:
    """Bytes of what is summed over half of the sequences, by pass; see `curvature.halves`.

    Args:
        group: The modules of a pair of passes.
        factors: What is fitted.
    """
    rows = sum(num_sampled(module.num_outputs) * module.input_size for module in group)
    return {
        "covariance": 8 * NUM_VECTORS * sum(factor_sizes(group).values()),
        "refit": 8 * rows if factors.refit != "none" else 0,
    }
