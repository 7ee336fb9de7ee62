"""In which order captured rows travel to their owners: the same on every worker."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ekfac_dist.models.find.faults import is_routed
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.passes.context import PassContext
from ekfac_dist.passes.owners import Owners, families, windows
from ekfac_dist.passes.row_order import GRADIENT, INPUT, Entry

_ROUND_BYTES = 2**27  # a round of fewer would be mostly latency


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
        """The schedule of some modules.

        Args:
            context: The model, and the order of its modules' rows.
            modules: The modules, in model order.
            owners: The mesh.
        """
        noted = context.row_order
        assert noted is not None, "rows are exchanged without their order"
        members = families(modules)
        order, num_before = noted.inputs, noted.num_inputs_before_gradients
        routed = noted.partial | {m.name for m in modules if is_routed(context.model, m)}
        routed |= {m.name for m in modules if (m.name, GRADIENT) not in noted.dtypes}
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
        largest = max(
            sum(noted.bytes_per_position.get(entry, 0) for entry in window) for window in in_order
        )
        return cls(
            in_order,
            {module.name: owners.places[module.input] for module in modules},
            frozenset(routed & {module.name for module in modules}),
            noted.dtypes,
            largest,
        )


def num_rounds(window_bytes: int, shard: int) -> int:
    """In how many rounds the rows of a window travel: more where they are large, for the memory.

    Args:
        window_bytes: Bytes of one worker's rows of a window.
        shard: D.
    """
    return max(1, min(shard - 1, window_bytes // _ROUND_BYTES))
