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
        activation_bytes: Bytes of the tensors that autograd saves for the backward, at the end of
            the forward, in a graph that begins at the lowest tracked module.
        logit_bytes: Bytes of the logits.
        itemsize: Bytes of one element in the model's dtype.
        checkpoints: Whether layers keep their inputs alone, and are computed again.
    """

    activation_bytes: int
    logit_bytes: int
    itemsize: int
    checkpoints: bool = False

    @classmethod
    def nothing(cls) -> "StepMemory":
        """The memory of no step: zeros."""
        return cls(0, 0, 0)


@dataclass
class SavedTensors:
    """Tensors that autograd saves for the backward, each storage once.

    Attributes:
        tensors: {address of a storage: one tensor that uses it}.
    """

    tensors: dict[int, Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Size of all storages in bytes."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())


@contextmanager
def noting_saved_tensors(model: nn.Module) -> Iterator[SavedTensors]:
    """Collects the tensors that autograd saves, except the model's parameters and buffers."""
    model_storages = {storage_of(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    saved = SavedTensors()

    def keep(tensor: Tensor) -> Tensor:
        if storage_of(tensor) not in model_storages:
            saved.tensors[storage_of(tensor)] = (
                tensor  # holding the tensor keeps its address from reuse
            )
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved
