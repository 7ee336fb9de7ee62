"""The memory of captured rows: those that wait for gradients, and those that are exchanged."""

from collections.abc import Iterable, Mapping, Sequence

from ekfac_dist.models.capture.saved_tensors import StepMemory
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.passes.exchange import MOST_TRAVELLING
from ekfac_dist.passes.owners import Places
from ekfac_dist.passes.schedule import num_rounds

# Rows that are collected at once, over those of the largest window.
_COLLECTED = 1.25


def input_elements(group: Iterable[TrackedModule], routed: Mapping[str, float]) -> float:
    """Elements I of the inputs of a group's modules at one position, shared ones once.

    Args:
        group: The modules.
        routed: The part of the positions that a module sees, by its name, if not all.
    """
    return sum({m.input: m.input_size * routed.get(m.name, 1) for m in group}.values())


def _window_bytes(step: StepMemory, window: Sequence[TrackedModule]) -> tuple[float, float]:
    """Bytes of the (inputs, output-gradients) of a window's modules at one position.

    Args:
        step: Gives their dtypes, and how many positions experts see.
        window: The modules.
    """
    gradients = sum(module.num_outputs * step.routed.get(module.name, 1) for module in window)
    return (
        step.itemsize * input_elements(window, step.routed),
        step.gradient_itemsize * gradients,
    )


def exchange_bytes(
    group: Sequence[TrackedModule], places: Places, step: StepMemory, step_tokens: int
) -> tuple[int, int]:
    """Bytes of the rows that a worker collects for owners, and of those on their way; and rounds.

    Args:
        group: The modules of a pass.
        places: Who owns what.
        step: The step.
        step_tokens: Its positions.

    Returns:
        The bytes, and in how many rounds a window travels.
    """
    shard = places.shard
    sides = [_window_bytes(step, window) for window in places.windows(group)]
    at_once = [sum(each) if step.checkpoints else max(each) for each in sides]
    window = int(step_tokens * max(at_once, default=0))
    rounds = num_rounds(window, shard)
    if shard == 1:
        return 0, rounds
    # The rows of a window leave while those of the next are collected. A round's rows are held by
    # their sender and their owner, and so are those of the rounds before that still travel.
    collected = _COLLECTED * window
    if step.exchanges_at_end:
        collected = step_tokens * sum(map(sum, sides))
    travelling = 2 * (1 + MOST_TRAVELLING) * window * (shard - 1) // shard // rounds
    return int(collected) + travelling, rounds
