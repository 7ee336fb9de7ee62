"""The kinds of work that `fit.py` compares: what they are is said there."""

from dataclasses import dataclass, replace

import torch
from model_shapes import Shape
from peer_environments import VERSIONS
from peer_sides import make_rows

LLAMA = Shape(768, 2048, 4, 4096)
QWEN = Shape(896, 4864, 24, 151936, heads=14, key_value_heads=2, qwen=True)
SMALL = {LLAMA: Shape(64, 160, 2, 256), QWEN: Shape(64, 176, 2, 512, 4, 2, qwen=True)}


@dataclass(frozen=True)
class Row:
    """One kind of work.

    Attributes:
        lengths: Fewest and most tokens of a sequence.
        peers: Who is asked.
        cannot: Who would be, but is not able to do it.
        order: Of the sequences that kronfluence is given, "length" or "given".
    """

    shape: Shape
    sequences: int
    lengths: tuple[int, int]
    workers: int = 1
    peers: tuple[str, ...] = tuple(VERSIONS)
    cannot: tuple[str, ...] = ()
    order: str = "length"

    def small(self):
        """The same in seconds."""
        low, high = (length // 4 for length in self.lengths)
        return replace(self, shape=SMALL[self.shape], sequences=24, lengths=(low, high))

    def part(self):
        """A quarter of its layers and half of its sequences."""
        shape = replace(self.shape, layers=max(1, self.shape.layers // 4))
        return replace(self, shape=shape, sequences=self.sequences // 2)

    def data(self):
        """Its sequences, the same each time."""
        generator = torch.Generator().manual_seed(1)
        return make_rows(self.sequences, self.lengths, self.shape.vocabulary, generator)

    def work(self):
        """What is done, in words."""
        low, high = self.lengths
        tokens = str(low) if low == high else f"{low} to {high}"
        workers = f", {self.workers} workers" if self.workers > 1 else ""
        return f"{self.sequences} sequences of {tokens} tokens{workers}"

    def __str__(self):
        return f"{self.work()}; {self.shape}"


ROWS = {
    "uniform": Row(LLAMA, 64, (256, 256)),
    "ragged": Row(LLAMA, 128, (32, 256)),
    "unsorted": Row(LLAMA, 128, (32, 256), peers=("kronfluence",), order="given"),
    "long": Row(LLAMA, 32, (512, 512)),
    # kronfluence's workers add up their factors on GPUs alone.
    "workers": Row(LLAMA, 64, (256, 256), workers=2, peers=("bergson",), cannot=("kronfluence",)),
    "qwen": Row(QWEN, 64, (512, 512), peers=("kronfluence",)),
}
DEFAULT_ROWS = ["uniform", "ragged", "long", "workers"]
