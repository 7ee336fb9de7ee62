"""Running sums of very many terms in float32, in two levels.

A float32 sum loses, or gains, up to half a unit of its last place with each term: sums of squared
Gaussians come out 2 % low after 10⁷ terms. So a running sum takes in a limited number of terms and
is then flushed: it is added to a second sum by an addition whose rounding error is computed exactly
(TwoSum: Knuth, The Art of Computer Programming, vol. 2, sec. 4.2.2), and starts again from that
error. A flush itself loses nothing; what remains are the errors of the terms between two flushes.

    terms ──> running sum (device) ── every FLUSH_AFTER terms ──> second level (host memory)
                      ^───────────── rounding error ─────────────────┘

The second level exists from the first flush on. float64 sums have none.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor

# Terms between two flushes; tests/curvature/test_long_sums.py simulates the errors. Squares of
# Gaussians come out 1e-7 low, terms with heavy tails (fourth powers of Gaussians, log-normal ones
# with σ = 3) 1e-6; equal terms, which are all rounded alike, are off by 3e-5, by 6e-5 at most.
# With fewer terms, shorter runs would need a second level, and more would be copied between a GPU
# and the host's memory.
FLUSH_AFTER = 4096

# Positions that matrix multiplication sums before it adds them to a running sum as one term. A GPU
# adds the product over all M positions at once. A CPU's library (oneMKL in torch 2.13) adds it some
# 200 positions at a time, or each by itself where a side of the sum is shorter than 12.
_POSITIONS_PER_TERM = 128
_NARROW = 16

# Prefixes of state keys, of the second level and of sums beside; no module's name begins so.
SECOND, BESIDE = "/second/", "/beside/"
_BLOCK = 2**20  # elements that are flushed at a time


class LongSums(ABC):
    """Running sums by name, each with a second level once it has many terms.

    A running sum may consist of several tensors, its parts. Its state is saved as tensors with the
    keys

        {name}/{part}                          a part of the running sum
        /second/{name}/{part}/{first row}      the second level of a block of rows of a part
        /beside/{name}                         a small sum beside them

    Args:
        names: Names of the sums.
        dtype: Their dtype, float32 or float64.

    Attributes:
        num_added: Number of terms of each sum since its last flush.
        beside: Small float64 sums of something else, by name, which are saved with the running
            sums; NaN if a saved state that was taken up lacks them.
    """

    def __init__(self, names: Iterable[str], dtype: torch.dtype) -> None:
        self.num_added = dict.fromkeys(names, 0)
        self._flush_after = FLUSH_AFTER if dtype == torch.float32 else sys.maxsize
        self._second: dict[str, Tensor] = {}
        self.beside: dict[str, Tensor] = {}

    @abstractmethod
    def _parts(self, name: str) -> list[Tensor]:
        """Views of the matrices that a running sum consists of; they may leave out unused areas."""

    def chunks(self, name: str, number: int, per_term: int = 1) -> Iterator[slice]:
        """Splits items into chunks between which the sum is flushed when it is due.

        The caller has to add each chunk to the running sum before it asks for the next.

        Args:
            name: The sum that the items are added to.
            number: Number of items: positions or sequences.
            per_term: How many items make one term; the last term of a chunk may have fewer.

        Yields:
            The items' slice of each chunk.
        """
        start = 0
        while start < number:
            most_items = per_term * (self._flush_after - self.num_added[name])
            chunk = slice(start, min(number, start + most_items))
            yield chunk
            self.num_added[name] += -(-(chunk.stop - start) // per_term)
            if self.num_added[name] >= self._flush_after:
                self._flush(name)
            start = chunk.stop

    def _flush(self, name: str) -> None:
        self.num_added[name] = 0
        for number, part in enumerate(self._parts(name)):
            for start, rows in _row_blocks(part):
                add_exactly_(self._second_of(f"{SECOND}{name}/{number}/{start}", rows), rows)

    def fold(self) -> None:
        """Adds the second level back into the running sums and frees its memory."""
        while self._second:
            self.add(*self._second.popitem())

    # -- saving and restoring ----------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Everything summed so far, in both levels and beside, by state key; not copied."""
        running = {
            f"{name}/{number}": part
            for name in self.num_added
            for number, part in enumerate(self._parts(name))
        }
        beside = {f"{BESIDE}{name}": tensor for name, tensor in self.beside.items()}
        return running | self._second | beside

    def restore(self, key: str, saved: Tensor) -> None:
        """Sets the tensor with a state key to its saved value."""
        if key.startswith(BESIDE):
            self.beside[key.removeprefix(BESIDE)].copy_(saved)
            return
        rows = self._rows(key, len(saved))
        if key.startswith(SECOND):
            self._second_of(key, rows).copy_(saved)
        else:
            rows.copy_(saved)

    def add(self, key: str, saved: Tensor) -> None:
        """Adds a saved tensor, of other sums of the same shapes, to a running sum.

        Args:
            key: State key of the saved tensor.
            saved: The saved tensor, of either level or of a sum beside.
        """
        if key.startswith(BESIDE):
            total = self.beside[key.removeprefix(BESIDE)]
            total.add_(saved.to(total.device))
            return
        rows = self._rows(key, len(saved))
        rows.add_(saved.to(rows.device))

    def holds(self, key: str) -> bool:
        """Whether a tensor with a state key belongs to one of these sums."""
        if key.startswith(BESIDE):
            return key.removeprefix(BESIDE) in self.beside
        key = key.removeprefix(SECOND).rsplit("/", 1)[0] if key.startswith(SECOND) else key
        return key.rsplit("/", 1)[0] in self.num_added

    def require_beside(self, keys: Collection[str]) -> None:
        """Makes sums beside NaN that a saved state lacks, as those of earlier versions do.

        Args:
            keys: The state keys of what it has; those of sums that are not held here, too.
        """
        beside = [key for key in keys if key.startswith(BESIDE)]
        if not beside and any(map(self.holds, keys)):
            for total in self.beside.values():
                total.fill_(float("nan"))

    def _rows(self, key: str, number: int) -> Tensor:
        """The matrix rows of a running sum that a state key of either level stands for."""
        if key.startswith(SECOND):
            key, start = key.removeprefix(SECOND).rsplit("/", 1)
        else:
            start = "0"
        name, part = key.rsplit("/", 1)
        return self._parts(name)[int(part)][int(start) : int(start) + number]

    def _second_of(self, key: str, rows: Tensor) -> Tensor:
        """A tensor of the second level, zero if it is new; pinned where the sums are on a GPU."""
        if key not in self._second:
            shape, dtype = rows.shape, rows.dtype
            self._second[key] = torch.zeros(shape, dtype=dtype, pin_memory=rows.is_cuda)
        return self._second[key]


def positions_per_term(side: int, device: torch.device) -> int:
    """How many positions of a matrix product are added to a running sum as one term.

    Args:
        side: The shorter side of the sum.
        device: Where the product is computed.
    """
    if device.type != "cpu":
        return sys.maxsize
    return 1 if side < _NARROW else _POSITIONS_PER_TERM


def add_exactly_(total: Tensor, rest: Tensor) -> None:
    """Adds `rest` to `total`, and replaces `rest` by the rounding error; both in place.

    Afterwards total + rest is exactly what it was before. Where the sum overflows, the error is
    NaN.

    Args:
        total: Becomes the rounded sum; on any device.
        rest: Of the same shape and dtype, on the device that computes; becomes what was rounded
            away.
    """
    before = total.to(rest.device)
    after = before + rest
    added = after - before
    rest.sub_(added).add_(before - (after - added))
    total.copy_(after)


def _row_blocks(part: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yields (first row, rows) of a matrix, in blocks of about `_BLOCK` elements.

    Blocks are small because scratch memory is as large as one of them, and because allocators that
    round pinned memory up to a power of two then waste little.
    """
    step = max(1, _BLOCK // part.shape[1])
    for start in range(0, part.shape[0], step):
        yield start, part[start : start + step]
