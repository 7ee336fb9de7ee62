"""Which sequences of a batch, and which captured positions, are of the even half of the data."""

from typing import cast

import torch
from torch import Tensor

from ekfac_dist.curvature.halves import even_positions, is_even
from ekfac_dist.data.batches import CapturedPositions, Positions


def are_even(positions: Positions) -> list[bool]:
    """Whether each sequence that has captured positions is an even one.

    Args:
        positions: The positions, as passes show them: with the sequences' indices.
    """
    return [is_even(index) for index in cast(CapturedPositions, positions).indices]


class EvenPositions:
    """The even sequences' positions of a batch, looked up once for all of its factors."""

    def __init__(self) -> None:
        self._positions: Positions | None = None
        self._even_m = torch.empty(0, dtype=torch.int64)

    def of(self, positions: Positions, device: torch.device) -> Tensor:
        """Which of the captured positions are of even sequences, int64 [m].

        Args:
            positions: The positions.
            device: Where the result is wanted.
        """
        if positions is not self._positions or self._even_m.device != device:
            self._even_m = even_positions(are_even(positions), positions.lengths, device)
            self._positions = positions
        return self._even_m
