"""Calls of tracked modules: of a linear map, or of one matrix of all experts of a layer."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ekfac_dist.data.batches import Grid, RoutedParts, RoutedPositions
from ekfac_dist.models.modules import TrackedModule


@dataclass(frozen=True)
class TrackedCall:
    """One call, whose input and output hold the rows of one module, or of several experts.

    Attributes:
        name: The module's; of experts that of their collection and matrix.
        modules: The module, or the experts' modules that have counted positions, in order.
        positions: Those of each module.
        real: Indices of all these positions among the rows [M]; None: they are all, in order.
        sizes: How many rows each expert of the collection has; None: there is one module.
    """

    name: str
    modules: Sequence[TrackedModule]
    positions: Sequence[Grid | RoutedPositions]
    real: Tensor | None
    sizes: Sequence[int] | None = None

    @classmethod
    def of(cls, module: TrackedModule, positions: Grid | RoutedPositions) -> "TrackedCall":
        """The call of a linear map."""
        return cls(module.name, [module], [positions], positions.real)

    @classmethod
    def of_experts(
        cls, modules: dict[int, TrackedModule], parts: RoutedParts, sizes: Sequence[int]
    ) -> "TrackedCall":
        """The call of one matrix of all experts of a collection.

        Args:
            modules: The tracked ones, by expert.
            parts: The counted positions of those that have any.
            sizes: How many rows each expert has.
        """
        collection, _, matrix = next(iter(modules.values())).fused
        return cls(
            f"{collection}.{matrix}",
            [modules[expert] for expert in parts.of_expert],
            list(parts.of_expert.values()),
            parts.real,
            sizes,
        )
