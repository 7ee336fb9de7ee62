"""Tensors that autograd saves in a forward for the backward: most of a step's memory."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ekfac_dist.models.sharding import storage_of


@dataclass(frozen=True)
class StepMemory:
    """Memory of one step's forward and backward, without running sums.

    Attributes:
        activation_bytes: Bytes of the tensors that autograd saves for the backward, at the end of
            the forward, in a graph that begins at the lowest tracked module. With gradient
            checkpointing: of all layers' inputs, and what the largest layer saves beside.
        logit_bytes: Bytes of the logits that are held at a time.
        itemsize: Bytes of one element in the model's dtype.
        checkpoints: Whether layers keep their inputs alone, and are computed again.
        are_logits_whole: Whether the logits of all positions are held, instead of a chunk.
        gradient_itemsize: Bytes of one element of captured output-gradients.
        routed: The part of the step's positions that a module sees, by its name, if not all.
        exchanges_at_end: Whether rows that travel to owners do so at the end of the step.
    """

    activation_bytes: int
    logit_bytes: int
    itemsize: int
    checkpoints: bool = False
    are_logits_whole: bool = False
    gradient_itemsize: int = 0
    routed: dict[str, float] = field(default_factory=dict)
    exchanges_at_end: bool = False

    def scaled(self, part: float) -> "StepMemory":
        """The memory of a step of a part of the positions; a chunk of the logits stays as large."""
        logit_bytes = int(part * self.logit_bytes) if self.are_logits_whole else self.logit_bytes
        return replace(
            self, activation_bytes=int(part * self.activation_bytes), logit_bytes=logit_bytes
        )

    def larger(self, other: "StepMemory") -> "StepMemory":
        """The most of each part of two steps of the same kind."""
        parts = {
            name: max(value, getattr(other, name))
            for name, value in vars(self).items()
            if name != "routed"
        }
        names = self.routed.keys() | other.routed.keys()
        seen = {n: max(self.routed.get(n, 0.0), other.routed.get(n, 0.0)) for n in names}
        return StepMemory(**parts, routed=seen)

    @classmethod
    def nothing(cls) -> "StepMemory":
        """The memory of no step: zeros."""
        return cls(0, 0, 0)


@dataclass
class SavedTensors:
    """Tensors that are kept for the backward, each storage once.

    With gradient checkpointing, tensors in a layer are kept for one layer at a time.

    Attributes:
        of_model: Addresses of the storages of the model's parameters and buffers, which are not
            counted.
        tensors: {address of a storage: one tensor that uses it}, for those kept all the time.
        largest_layer_bytes: Size of what else the largest layer's backward needs; 0 without
            checkpointing.
    """

    of_model: set[int]
    tensors: dict[int, Tensor] = field(default_factory=dict)
    largest_layer_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Size in bytes of all storages that are kept at once."""
        return _bytes_of(self.tensors) + self.largest_layer_bytes

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Notes tensors that are kept all the time."""
        for tensor in tensors:
            if storage_of(tensor) not in self.of_model:
                # Holding the tensor keeps its address from reuse.
                self.tensors[storage_of(tensor)] = tensor

    def add_layer(self, tensors: Iterable[Tensor], layer: nn.Module) -> None:
        """Notes tensors that are kept while the backward of one layer runs.

        Args:
            tensors: All tensors that autograd saves in the layer.
            layer: The layer; its weights, which may be gathered now, are not counted.
        """
        weights = {storage_of(parameter) for parameter in layer.parameters()}
        known = weights | self.of_model | self.tensors.keys()
        own = {storage_of(t): t for t in tensors if storage_of(t) not in known}
        self.largest_layer_bytes = max(self.largest_layer_bytes, _bytes_of(own))


def _bytes_of(tensors: Mapping[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


@contextmanager
def noting_saved_tensors(model: nn.Module) -> Iterator[SavedTensors]:
    """Collects the tensors that autograd saves, except the model's parameters and buffers."""
    saved = SavedTensors({storage_of(tensor) for tensor in [*model.parameters(), *model.buffers()]})

    def keep(tensor: Tensor) -> Tensor:
        saved.add([tensor])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved
