"""Tensors that autograd saves in a forward for the backward: most of a step's memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ekfac_dist.models.sharding import storage_of


@dataclass(frozen=True)
class StepMemory:
    """Memory of one step's forward and backward, without running sums.

    Attributes:
        activation_bytes: Tensors that autograd saves for the backward, at the end of the forward,
            of a graph that begins at the lowest tracked module.
        logit_bytes: The logits.
        itemsize: Bytes of one element in the model's dtype.
    """

    activation_bytes: int
    logit_bytes: int
    itemsize: int

    @classmethod
    def nothing(cls) -> "StepMemory":
        """The memory of no step at all."""
        return cls(0, 0, 0)


@dataclass
class SavedTensors:
    """Tensors that autograd saves for the backward, each storage once.

    Attributes:
        tensors: One tensor of each storage, by the storage's address.
    """

    tensors: dict[int, Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Size of all storages, in bytes."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())


@contextmanager
def noting_saved_tensors(model: nn.Module) -> Iterator[SavedTensors]:
    """Notes every tensor that autograd saves, except the model's parameters and buffers."""
    own = {storage_of(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    saved = SavedTensors()

    def keep(tensor: Tensor) -> Tensor:
        if storage_of(tensor) not in own:
            saved.tensors[storage_of(tensor)] = tensor  # keeps its address from reuse
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved
