"""Partition of the tracked modules into groups, each with a pair of passes of its own."""

from collections.abc import Sequence

from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.passes.owners import families, family_cost


def partition(modules: Sequence[TrackedModule], number: int) -> list[list[TrackedModule]]:
    """Cuts modules, in model order, into at most `number` groups of about equal factor memory.

    Modules that share an input stay together.

    Args:
        modules: In model order.
        number: Wanted number of groups; fewer if there are not enough modules.
    """
    by_input = families(modules)
    weights = [family_cost(members) for members in by_input.values()]
    number = min(number, len(by_input))
    groups: list[list[TrackedModule]] = []
    passed, whole = 0.0, sum(weights)
    members_left = len(by_input)
    for members, weight in zip(by_input.values(), weights, strict=True):
        begins = len(groups) * whole / number
        # A family begins a group once the groups before it have their share, and sooner if there
        # are only just enough families left for the groups still to come.
        is_due = passed >= begins - 1e-9 * whole or number - len(groups) >= members_left
        if is_due and len(groups) < number:
            groups.append([])
        groups[-1].extend(members)
        passed += weight
        members_left -= 1
    return groups
