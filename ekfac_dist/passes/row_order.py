"""In which order a step shows the captured rows of modules: noted once, the same in every pass."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ekfac_dist.data.batches import CapturedPositions
from ekfac_dist.models.modules import TrackedModule

INPUT, GRADIENT = "input", "gradient"
Entry = tuple[str, str]  # a module's name, and INPUT or GRADIENT


@dataclass
class RowOrder:
    """An observer that notes in which order a step shows which rows, their dtypes and sizes.

    Args:
        num_positions: The step's positions.

    Attributes:
        inputs: Names of input factors, in the order in which they are shown.
        num_inputs_before_gradients: How many of them come before the first output-gradient.
        dtypes: Dtype of each entry's rows, where the step has any.
        bytes_per_position: Bytes of these rows, over the step's positions.
        partial: Names of modules that see only some of these positions.
    """

    num_positions: int
    inputs: list[str] = field(default_factory=list)
    num_inputs_before_gradients: int | None = None
    dtypes: dict[Entry, torch.dtype] = field(default_factory=dict)
    bytes_per_position: dict[Entry, float] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)

    def on_input(
        self, module: TrackedModule, acts_Mi: Tensor, positions: CapturedPositions
    ) -> None:
        """Notes an input."""
        self.inputs.append(module.input)
        self._note((module.name, INPUT), acts_Mi, positions)

    def on_gradient(
        self, module: TrackedModule, grads_MO: Tensor, positions: CapturedPositions
    ) -> None:
        """Notes an output-gradient."""
        if self.num_inputs_before_gradients is None:
            self.num_inputs_before_gradients = len(self.inputs)
        self._note((module.name, GRADIENT), grads_MO, positions)

    def _note(self, entry: Entry, rows: Tensor, positions: CapturedPositions) -> None:
        self.dtypes[entry] = rows.dtype
        self.bytes_per_position[entry] = rows.nbytes / self.num_positions
        if positions.offsets is not None:
            self.partial.add(entry[0])
