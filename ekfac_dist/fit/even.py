"""Which sequences of a batch, and which captured positions, are of the even half of the data."""

from collections.abc import Sequence
from operator import is_
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.curvature.halves import even_mask, is_even
from ekfac_dist.data.batches import CapturedPositions, Positions, to_device


def are_even(positions: Positions) -> list[bool]:
    """Whether each sequence that has captured positions is an even one.

    Args:
        positions: The positions, as passes show them: with the sequences' indices.
    """
    return [is_even(index) for index in cast(CapturedPositions, positions).indices]


class EvenPositions:
    """The even sequences' positions, looked up once for all factors that see the same ones."""

    def __init__(self) -> None:
        self._positions: Sequence[Positions] = ()
        self._even_m = torch.empty(0, dtype=torch.int64)
        self._numbers: list[int] = []

    def of(
        self, positions: Sequence[Positions], device: torch.device
    ) -> tuple[Tensor, Sequence[int]]:
        """Which of the captured positions of some modules are of even sequences.

        Args:
            positions: Those of each module.
            device: Where the result is wanted.

        Returns:
            Their indices among the positions of all these modules, int64 [m], and how many are
            each module's.
        """
        is_known = len(positions) == len(self._positions) and all(
            map(is_, positions, self._positions)
        )
        if not is_known or self._even_m.device != device:
            masks = [even_mask(are_even(each), each.lengths) for each in positions]
            self._numbers = [int(mask.sum()) for mask in masks]
            even_m = np.flatnonzero(np.concatenate(masks))
            self._even_m = to_device(torch.from_numpy(even_m), device)
            self._positions = positions
        return self._even_m, self._numbers
