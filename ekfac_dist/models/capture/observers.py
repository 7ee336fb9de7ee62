"""What is done with captured inputs and output-gradients: the contract, and its common part.

In a forward an observer is given each input of the tracked modules, once even if several modules
read it; in the backward that follows, each module's output-gradient, the last module first.

    forward     on_input(gate, x)              gate and up read the same x: it is shown once
    backward    on_gradient(up, g), on_gradient(gate, g)

Where layers are computed again in the backward, a layer's inputs come there, right before its
gradients. In either case an input comes before the gradients of all modules that read it.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from ekfac_dist.data.batches import CapturedPositions, Positions
from ekfac_dist.models.modules import TrackedModule

T = TypeVar("T")
P = TypeVar("P", bound=Positions)


class Observer(Protocol):
    """Takes what passes through the tracked modules, at counted positions, sequence by sequence.

    An expert's positions are those that were routed to it; where there are none, nothing is called.
    """

    def on_input(
        self, module: TrackedModule, acts_Mi: Tensor, positions: CapturedPositions
    ) -> None:
        """Takes an input [M, i] of one or more modules.

        Args:
            module: The first, in model order, of the observed modules that read it.
            acts_Mi: The input without the bias coordinate.
            positions: Which sequence each of the M positions belongs to.
        """

    def on_gradient(
        self, module: TrackedModule, grads_MO: Tensor, positions: CapturedPositions
    ) -> None:
        """Takes the gradient [M, O] of the batch's summed losses with respect to an output.

        Args:
            module: The module.
            grads_MO: The gradient.
            positions: Which sequence each of the M positions belongs to.
        """


@dataclass(frozen=True)
class CapturedGroup:
    """Inputs, or output-gradients, of one matrix of several experts of a layer.

    Attributes:
        modules: The experts' modules.
        rows: Those of all of them [M, i] or [M, O], module after module.
        positions: Which sequence each module's positions belong to.
    """

    modules: Sequence[TrackedModule]
    rows: Tensor
    positions: Sequence[CapturedPositions]

    @property
    def parts(self) -> list[tuple[TrackedModule, Tensor, CapturedPositions]]:
        """(module, rows, positions) of each module."""
        rows = self.rows.split([positions.num_positions for positions in self.positions])
        return list(zip(self.modules, rows, self.positions, strict=True))


@runtime_checkable
class GroupObserver(Protocol):
    """An observer that takes what several experts of a layer show at once, as it gains by that."""

    def on_inputs(self, group: CapturedGroup) -> None:
        """Takes inputs; see `Observer.on_input`."""

    def on_gradients(self, group: CapturedGroup) -> None:
        """Takes output-gradients; see `Observer.on_gradient`."""


def show_inputs(observer: Observer, group: CapturedGroup) -> None:
    """Shows an observer inputs, at once or module by module."""
    if len(group.modules) > 1 and isinstance(observer, GroupObserver):
        observer.on_inputs(group)
        return
    for module, rows, positions in group.parts:
        observer.on_input(module, rows, positions)


def show_gradients(observer: Observer, group: CapturedGroup) -> None:
    """Shows an observer output-gradients, at once or module by module, the last module first."""
    if len(group.modules) > 1 and isinstance(observer, GroupObserver):
        observer.on_gradients(group)
        return
    for module, rows, positions in reversed(group.parts):
        observer.on_gradient(module, rows, positions)


class NullObserver:
    """The observer that ignores everything."""

    def on_input(
        self, module: TrackedModule, acts_Mi: Tensor, positions: CapturedPositions
    ) -> None:
        """Ignores an input."""

    def on_gradient(
        self, module: TrackedModule, grads_MO: Tensor, positions: CapturedPositions
    ) -> None:
        """Ignores a gradient."""


class SharedInputs(Generic[T]):
    """Values that belong to inputs, each held until every module that reads the input has taken it.

    Args:
        modules: The modules that will take values.
    """

    def __init__(self, modules: Iterable[TrackedModule]) -> None:
        self._num_readers = Counter(module.input for module in modules)
        self._num_left: dict[tuple[str, int], int] = {}
        self._values: dict[tuple[str, int], T] = {}

    def __contains__(self, module: TrackedModule) -> bool:
        return (module.input, 0) in self._values

    def put(self, module: TrackedModule, value: T, sender: int = 0) -> None:
        """Holds the value of a module's input for all modules that read it.

        Args:
            module: The module.
            value: The value.
            sender: The worker whose input it belongs to.
        """
        self._values[module.input, sender] = value
        self._num_left[module.input, sender] = self._num_readers[module.input]

    def take(self, module: TrackedModule, sender: int = 0) -> T:
        """The value of a module's input; it is dropped when its last reader takes it."""
        key = (module.input, sender)
        self._num_left[key] -= 1
        return self._values[key] if self._num_left[key] else self._values.pop(key)

    def clear(self) -> None:
        """Drops all values."""
        self._values.clear()


class PairObserver(ABC, Generic[P]):
    """An observer of pairs: a module's input and output-gradient at the same positions.

    An input is prepared once, however many modules read it, and held until the last of them has its
    gradient.

    Args:
        modules: The modules that are observed.
    """

    def __init__(self, modules: Iterable[TrackedModule]) -> None:
        self._inputs = SharedInputs[Tensor](modules)

    @abstractmethod
    def prepare_input(self, module: TrackedModule, acts_Mi: Tensor, positions: P) -> Tensor:
        """The input as `on_pair` wants it, in memory that the model does not write to.

        Args:
            module: The first module that reads it.
            acts_Mi: The input without the bias coordinate.
            positions: Which sequence each of the M positions belongs to.
        """

    @abstractmethod
    def on_pair(self, module: TrackedModule, acts: Tensor, grads_MO: Tensor, positions: P) -> None:
        """Takes a module's prepared input and its output-gradient.

        Args:
            module: The module.
            acts: What `prepare_input` gave, M positions.
            grads_MO: The gradient of the batch's summed losses with respect to the output.
            positions: Which sequence each of the M positions belongs to.
        """

    def on_input(self, module: TrackedModule, acts_Mi: Tensor, positions: P) -> None:
        """Prepares an input and holds it; see `Observer.on_input`."""
        value = self.prepare_input(module, acts_Mi, positions)
        self._inputs.put(module, value, positions.sender)

    def on_gradient(self, module: TrackedModule, grads_MO: Tensor, positions: P) -> None:
        """Pairs a gradient with its input; see `Observer.on_gradient`."""
        acts = self._inputs.take(module, positions.sender)
        self.on_pair(module, acts, grads_MO, positions)


def owned(acts_Mi: Tensor, positions: Positions) -> Tensor:
    """An input that the model cannot write to any more: a copy, unless it is one already."""
    return acts_Mi if positions.are_copies else acts_Mi.clone()
