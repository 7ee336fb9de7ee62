"""Running sums of very many terms in float32, in two levels.

A float32 sum loses, or gains, up to half a unit of its last place with each term: sums of squared
Gaussians come out 2 % low after 10⁷ terms. So a running sum takes in only so many terms. It is then
flushed: added into a second sum by an addition whose rounding error is computed exactly (TwoSum:
Knuth, The Art of Computer Programming, vol. 2, sec. 4.2.2), and left with that error. Nothing is
lost at a flush; what is left are the errors of the terms between two of them.

The second level lies in the host's memory, from the first flush on. float64 sums have none.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# Terms between two flushes; tests/curvature/test_long_sums.py simulates the errors. Squares of
# Gaussians come out 1e-7 low, terms with heavy tails (fourth powers of Gaussians, log-normal ones
# with σ = 3) 1e-6; equal terms, which are all rounded alike, are off by 3e-5, by 6e-5 at most.
# With fewer, shorter runs would hold a second level, and a GPU's bus would have more to carry.
FLUSH_AFTER = 4096

# A GPU adds a product of M rows to a running sum at once. A CPU's library (oneMKL in torch 2.13)
# adds it some 200 rows at a time, or each row by itself where a side of the sum is shorter than 12.
_ROWS_OF_TERM = 128
_NARROW = 16

SECOND = "/second/"  # what names of the second level begin with; no module's name begins so
_BLOCK = 2**20  # elements that are flushed at a time


class LongSums(ABC):
    """Running sums by name, each with a second level once it has many terms.

    Args:
        names: What the sums are called.
        dtype: float32 or float64.

    Attributes:
        num_added: Terms of each sum since its last flush.
    """

    def __init__(self, names: Iterable[str], dtype: torch.dtype) -> None:
        self.num_added = dict.fromkeys(names, 0)
        self._flush_after = FLUSH_AFTER if dtype == torch.float32 else sys.maxsize
        self._second: dict[str, Tensor] = {}

    @abstractmethod
    def _parts(self, name: str) -> list[Tensor]:
        """Views of the parts of a running sum that are summed."""

    def chunks(self, name: str, number: int, per_term: int = 1) -> Iterator[slice]:
        """Cuts what a sum is to take in where it has to be flushed; who iterates adds each share.

        Args:
            name: The sum.
            number: Rows, or sequences.
            per_term: How many of them make a term; the last term of a share may have fewer.
        """
        start = 0
        while start < number:
            room = per_term * (self._flush_after - self.num_added[name])
            share = slice(start, min(number, start + room))
            yield share
            self.num_added[name] += -(-(share.stop - start) // per_term)
            if self.num_added[name] >= self._flush_after:
                self._flush(name)
            start = share.stop

    def _flush(self, name: str) -> None:
        self.num_added[name] = 0
        for number, part in enumerate(self._parts(name)):
            for start, rows in _row_blocks(part):
                add_exactly_(self._second_of(f"{SECOND}{name}/{number}/{start}", rows), rows)

    def fold(self) -> None:
        """Adds the second level back into the running sums, and gives it up."""
        while self._second:
            self.add(*self._second.popitem())

    # -- what is saved of them ---------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """All that is summed so far, of both levels, by names that only this class reads."""
        first = {
            f"{name}/{number}": part
            for name in self.num_added
            for number, part in enumerate(self._parts(name))
        }
        return first | self._second

    def restore(self, piece: str, saved: Tensor) -> None:
        """Sets a piece of either level to what was saved of it."""
        rows = self._rows(piece, len(saved))
        if piece.startswith(SECOND):
            self._second_of(piece, rows).copy_(saved)
        else:
            rows.copy_(saved)

    def add(self, piece: str, saved: Tensor) -> None:
        """Adds a piece of either level of other sums of the same to the running sums."""
        rows = self._rows(piece, len(saved))
        rows.add_(saved.to(rows.device))

    def _rows(self, piece: str, number: int) -> Tensor:
        """What a piece of either level is a part of, in the running sums."""
        if piece.startswith(SECOND):
            piece, start = piece.removeprefix(SECOND).rsplit("/", 1)
        else:
            start = "0"
        name, part = piece.rsplit("/", 1)
        return self._parts(name)[int(part)][int(start) : int(start) + number]

    def _second_of(self, piece: str, rows: Tensor) -> Tensor:
        """A piece of the second level, zero if it is new; pinned, for a GPU to reach it."""
        if piece not in self._second:
            shape, dtype = rows.shape, rows.dtype
            self._second[piece] = torch.zeros(shape, dtype=dtype, pin_memory=rows.is_cuda)
        return self._second[piece]


def positions_per_term(side: int, device: torch.device) -> int:
    """How many rows of a product are added to a running sum as one term.

    Args:
        side: The shorter side of the sum.
        device: Where it is computed.
    """
    if device.type != "cpu":
        return sys.maxsize
    return 1 if side < _NARROW else _ROWS_OF_TERM


def add_exactly_(total: Tensor, rest: Tensor) -> None:
    """Adds the second of two tensors to the first, and leaves the rounding error in the second.

    Where the sum overflows, the error is NaN.

    Args:
        total: Becomes the rounded sum.
        rest: Of the same shape and dtype, on the device that computes; becomes what was rounded
            away, so that total + rest is what it was.
    """
    before = total.to(rest.device)
    after = before + rest
    taken = after - before
    rest.sub_(taken).add_(before - (after - taken))
    total.copy_(after)


def _row_blocks(part: Tensor) -> Iterator[tuple[int, Tensor]]:
    """A matrix in blocks of rows of about `_BLOCK` elements, with the number of their first row.

    No larger, for scratch memory is as large, and so that allocators which round pinned memory up
    to a power of two waste little.
    """
    step = max(1, _BLOCK // part.shape[1])
    for start in range(0, part.shape[0], step):
        yield start, part[start : start + step]
