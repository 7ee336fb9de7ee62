"""In which order captured rows travel to their owners: the same on every worker."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac_dist.data.batches import CapturedPositions
from ekfac_dist.models.capture.labels import LabelRule
from ekfac_dist.models.find.faults import is_routed
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.passes.context import PassContext
from ekfac_dist.passes.owners import Owners, families, windows

INPUT, GRADIENT = "input", "gradient"
Entry = tuple[str, str]  # a module's name, and INPUT or GRADIENT

_ROUND_BYTES = 2**27  # a round of fewer would be mostly latency


class _Noted:
    """An observer that notes in which order a step shows which rows, their dtypes and sizes."""

    def __init__(self) -> None:
        self.inputs: list[str] = []  # in the order in which they are shown
        self.num_inputs_before_gradients: int | None = None
        self.dtypes: dict[Entry, torch.dtype] = {}
        self.num_bytes: dict[Entry, int] = {}
        self.partial: set[str] = set()

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
        self.num_bytes[entry] = rows.nbytes
        if positions.offsets is not None:
            self.partial.add(entry[0])


@dataclass(frozen=True)
class Schedule:
    """In which order rows are exchanged; the same on every worker.

    Attributes:
        windows: What is exchanged together: the inputs of each window of families, then the
            output-gradients. Inputs that only the backward shows, in a forward that is repeated for
            it, come with their gradients.
        places: The place of each module's owner.
        routed: Names of modules that see only some of a batch's positions, or an unknown part.
        dtypes: Dtype of each entry's rows, where the short sequence had any.
        largest_window: Bytes of one worker's rows of the largest window, per position of its batch.
    """

    windows: Sequence[Sequence[Entry]]
    places: Mapping[str, int]
    routed: frozenset[str]
    dtypes: Mapping[Entry, torch.dtype]
    largest_window: float

    @classmethod
    def of(
        cls, context: PassContext, modules: Sequence[TrackedModule], owners: Owners
    ) -> "Schedule":
        """The schedule of some modules, from a step of a short sequence; a collective.

        Args:
            context: Model, data and workers.
            modules: The modules, in model order.
            owners: The mesh.
        """
        noted = _Noted()
        batch = context.shortest_batch()
        with context.capture(modules, noted, None) as capture:
            capture.run(batch, LabelRule("data", 0, 0))
        order, num_before = noted.inputs, noted.num_inputs_before_gradients
        # Which experts the sequence reached may differ between workers, in the last bits.
        order, num_before, dtypes, num_bytes, partial = context.world.share(
            (order, num_before, noted.dtypes, noted.num_bytes, noted.partial)
        )
        routed = partial | {m.name for m in modules if is_routed(context.model, m)}
        routed |= {m.name for m in modules if (m.name, GRADIENT) not in dtypes}
        members = families(modules)
        in_forward = dict.fromkeys(order[:num_before], True) | dict.fromkeys(
            order[num_before:], False
        )
        # Families that the short sequence did not reach are like those before them.
        place, places = -1, {}
        is_early, early = True, set()
        for name in members:
            place = order.index(name) if name in in_forward else place
            places[name] = place
            is_early = in_forward.get(name, is_early)
            early |= {name} if is_early else set()
        if len(early) == len(members):  # in the order of the forward
            modules = [m for name in sorted(members, key=places.__getitem__) for m in members[name]]
        inputs, rest = [], []
        for window in windows(modules, owners.shard):
            first = {name: (members[name][0].name, INPUT) for name in window}
            called = [module for name in window for module in members[name]]
            inputs.append([first[name] for name in window if name in early])
            rest.append(
                [first[name] for name in window if name not in early]
                + [(module.name, GRADIENT) for module in reversed(called)]
            )
        in_order = [window for window in (*inputs, *reversed(rest)) if window]
        # Of a window's experts each sees only some positions, but all together as many every time.
        largest = max(sum(num_bytes.get(entry, 0) for entry in window) for window in in_order)
        return cls(
            in_order,
            {module.name: owners.places[module.input] for module in modules},
            frozenset(routed),
            dtypes,
            largest / max(1, batch.num_positions),
        )


def num_rounds(window_bytes: int, shard: int) -> int:
    """In how many rounds the rows of a window travel: more where they are large, for the memory.

    Args:
        window_bytes: Bytes of one worker's rows of a window.
        shard: D.
    """
    return max(1, min(shard - 1, window_bytes // _ROUND_BYTES))
