"""Pass 1: running sums Σ a aᵀ and Σ g gᵀ, with their counts, one of each factor."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ekfac_dist.curvature import halves, long_sums
from ekfac_dist.curvature.blocks import block_sizes, bounds
from ekfac_dist.curvature.costs import stored_rows
from ekfac_dist.curvature.covariance import (
    add_outer_products_,
    mirror_,
    outer_product_positions_per_term,
)
from ekfac_dist.curvature.float32_products import precisely
from ekfac_dist.data.batches import Positions
from ekfac_dist.fit.even import EvenPositions
from ekfac_dist.models.capture.observers import CapturedGroup
from ekfac_dist.models.modules import TrackedModule, factor_sizes
from ekfac_dist.runtime.processes import World


class CovarianceSums(long_sums.LongSums):
    """Running sums of the covariances of a group's factors; a term is a product of some positions.

    Args:
        modules: The group, in model order.
        dtype: float32 or float64.
        device: Where the sums are held.
        blocks: Number of blocks on the diagonal of each factor.
        with_halves: Whether to sum what `relative_differences` needs, over the even sequences:
            positions that are shown know their sequences' indices.

    Attributes:
        sums: By factor, the raw sum [n, n] of each of its blocks; upper triangles are meaningless
            until `reduce` or `finish` fills them.
        counts: Number of summed positions of each factor.
    """

    def __init__(
        self,
        modules: Sequence[TrackedModule],
        dtype: torch.dtype,
        device: torch.device,
        blocks: int = 1,
        *,
        with_halves: bool = False,
    ) -> None:
        self.sums: dict[str, list[Tensor]] = {
            name: [torch.zeros(n, n, dtype=dtype, device=device) for n in block_sizes(size, blocks)]
            for name, size in factor_sizes(modules).items()
        }
        self.counts = dict.fromkeys(self.sums, 0)
        self._zero = torch.zeros(1, dtype=dtype, device=device)
        self._with_bias = {module.input for module in modules if module.bias}
        super().__init__(self.sums, dtype)
        self._even = EvenPositions()
        self._signs: dict[int, Tensor] = {}  # by size of factor
        for factor, size in factor_sizes(modules).items() if with_halves else ():
            if size not in self._signs:
                like = torch.empty(0, dtype=dtype, device=device)
                self._signs[size] = halves.fixed_vectors(size, like)
            sketch_kn = torch.zeros_like(self._signs[size], dtype=torch.float64)
            self.beside[factor] = sketch_kn
            self.beside[_positions_of(factor)] = sketch_kn.new_zeros(1)

    def on_input(self, module: TrackedModule, acts_Mi: Tensor, positions: Positions) -> None:
        """Adds inputs to the module's input factor."""
        self._add([module.input], acts_Mi, [positions])

    def on_gradient(self, module: TrackedModule, grads_MO: Tensor, positions: Positions) -> None:
        """Adds output-gradients to the module's output factor."""
        self._add([module.output], grads_MO, [positions])

    def on_inputs(self, group: CapturedGroup) -> None:
        """Adds inputs of several experts."""
        self._add([module.input for module in group.modules], group.rows, group.positions)

    def on_gradients(self, group: CapturedGroup) -> None:
        """Adds output-gradients of several experts."""
        self._add([module.output for module in group.modules], group.rows, group.positions)

    def _add(
        self, factors: Sequence[str], vectors_Mi: Tensor, positions: Sequence[Positions]
    ) -> None:
        """Adds the vectors of several factors of one size.

        Args:
            factors: Their names.
            vectors_Mi: The vectors of all of them, factor after factor.
            positions: Those of each factor.
        """
        blocks, num_columns = self.sums[factors[0]], vectors_Mi.shape[1]
        sizes = [len(block) for block in blocks]
        places = [
            # The last coordinate is the bias's, where the vectors lack it.
            (slice(start, min(end, num_columns)), end > num_columns)
            for start, end in bounds(sizes)
        ]
        per_term = outer_product_positions_per_term(
            [columns.stop - columns.start for columns, _ in places], blocks[0].device
        )
        numbers = [each.num_positions for each in positions]
        for factor, rows in zip(factors, vectors_Mi.split(numbers), strict=True):
            for share in self.chunks(factor, len(rows), per_term):
                for block, (columns, bias) in zip(self.sums[factor], places, strict=True):
                    add_outer_products_(block, rows[share, columns], bias=bias)
            self.counts[factor] += len(rows)
        if factors[0] in self.beside:
            even_m, num_even = self._even.of(positions, vectors_Mi.device)
            sketches = [self.beside[factor] for factor in factors]
            halves.add_sketches_(
                sketches, vectors_Mi, even_m, num_even, self._signs[sum(sizes)], sizes
            )
            of_even = [self.beside[_positions_of(factor)] for factor in factors]
            torch._foreach_add_(of_even, list(num_even))

    def has_any(self, factor: str) -> bool:
        """Whether a factor's sum is not zero."""
        return any(bool(block.diagonal().any()) for block in self.sums[factor])

    def _parts(self, name: str) -> list[Tensor]:
        """Views of block rows: the lower triangles and little more."""
        parts = []
        for total in self.sums[name]:
            size = total.shape[0]
            for start in range(0, size, stored_rows(size)):
                end = min(start + stored_rows(size), size)
                parts.append(total[start:end, :end])
        return parts

    def keep(self, modules: Sequence[TrackedModule]) -> None:
        """Drops the sums of all other modules."""
        factors = factor_sizes(modules)
        self.sums = {name: blocks for name, blocks in self.sums.items() if name in factors}
        self.counts = {name: count for name, count in self.counts.items() if name in factors}
        self.num_added = {name: self.num_added[name] for name in self.sums}

    def move_to(self, device: torch.device) -> None:
        """Moves the sums to another device, one after the other."""
        for blocks in self.sums.values():
            for number, block in enumerate(blocks):
                blocks[number] = block.to(device)

    def health(self) -> Tensor:
        """Σ of all diagonals, a float64 scalar: finite exactly as long as every sum is."""
        diagonals = [block.diagonal() for block in self._blocks()]
        return torch.cat([self._zero, *diagonals]).sum(dtype=torch.float64)

    def reduce(self, world: World) -> None:
        """Replaces sums and counts by those over all workers, and completes the sums."""
        self.fold()
        counts = torch.tensor(list(self.counts.values()), dtype=torch.int64, device=world.device)
        world.all_reduce_([*self._blocks(), counts, *self.beside.values()])
        self.counts = dict(zip(self.counts, counts.tolist(), strict=True))
        self.finish()

    def finish(self) -> None:
        """Completes the sums: upper triangles, and the square of the bias coordinate.

        That square is the count of positions, which a float32 sum holds exactly only up to 2²⁴.
        """
        for factor in self._with_bias & self.sums.keys():
            self.sums[factor][-1][-1, -1] = self.counts[factor]
        for total in self._blocks():
            mirror_(total)

    def relative_differences(self) -> dict[str, float | None]:
        """‖δ‖ / ‖X‖ of each factor X, of the reduced sums: what half of the data is off.

        Returns:
            By factor; None as of `halves.relative_difference`; factors whose sums of a half are not
            known (NaN) are left out.
        """
        differences: dict[str, float | None] = {}
        for factor, blocks in self.sums.items():
            num_even = self.beside[_positions_of(factor)].item()
            if math.isfinite(num_even):
                with precisely(blocks[0].device):
                    differences[factor] = halves.relative_difference(
                        self.beside[factor], int(num_even), blocks, self.counts[factor]
                    )
        return differences

    def _blocks(self) -> list[Tensor]:
        return [block for blocks in self.sums.values() for block in blocks]


def _positions_of(factor: str) -> str:
    """Name of the number of positions in a factor's sketch, among the sums beside."""
    return f"{factor}/positions"
