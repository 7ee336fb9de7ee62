"""What autograd keeps of a forward for the backward: most of what a step holds."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ekfac_dist.models.sharding import storage_of


@dataclass(frozen=True)
class Step:
    """What a step holds, without what is summed.

    Attributes:
        activation_bytes: Kept by autograd for the backward, at the end of the forward, if the graph
            begins at the lowest of all modules.
        logit_bytes: Of the logits.
        itemsize: Bytes of a number of the model's.
    """

    activation_bytes: int
    logit_bytes: int
    itemsize: int

    @classmethod
    def nothing(cls) -> "Step":
        """No step at all."""
        return cls(0, 0, 0)


@dataclass
class Kept:
    """Tensors that autograd keeps, each once, by where its numbers are."""

    tensors: dict[int, Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Of all of them."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())


@contextmanager
def keeping(model: nn.Module) -> Iterator[Kept]:
    """Within it, what autograd keeps is noted, but for the model's own parameters and buffers."""
    own = {storage_of(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    kept = Kept()

    def keep(tensor: Tensor) -> Tensor:
        if storage_of(tensor) not in own:
            kept.tensors[storage_of(tensor)] = tensor  # held, so that its place is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept
