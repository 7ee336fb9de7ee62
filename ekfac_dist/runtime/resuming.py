"""Whether an unfinished run in an output directory is the same run."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ekfac_dist.config import dotted
from ekfac_dist.errors import OutputError


def require_same_config(
    path: Path, found: Any, config: Mapping[str, Any], *, may_change: Iterable[str], advice: str
) -> None:
    """Refuses to go on with an unfinished run of another configuration.

    Args:
        path: The run's output.
        found: The configuration that its manifest has.
        config: The configuration now.
        may_change: Dotted names of the fields that may differ.
        advice: What would do.

    Raises:
        OutputError: They differ; the fields are named with both values.
    """
    before, now = dotted(found), dotted(json.loads(json.dumps(config)))
    for field in may_change:
        before.pop(field, None)
        now.pop(field, None)
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        told = ", ".join(f"{n} {before.get(n)!r} (now {now.get(n)!r})" for n in changed[:4])
        raise OutputError(
            f"output {path} holds another run, unfinished and of another configuration: {told}"
            f"{', …' if len(changed) > 4 else ''}; {advice}."
        )


def require_same_beginning(
    path: Path, found: Any, begins: Mapping[str, Any], *, advice: str
) -> None:
    """Refuses to go on with an unfinished run that began with something else.

    Args:
        path: The run's output.
        found: What its manifest says that it began with.
        begins: What this run begins with, by name: texts, numbers, or groups of them. Fractions
            are compared to rounding, for they may come from another machine.
        advice: What would do.

    Raises:
        OutputError: Something differs, and is named with both values.
    """
    before, now = dotted(found if isinstance(found, dict) else {}), dotted(begins)
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, float) and isinstance(new, float):
            is_same = math.isclose(old, new, rel_tol=1e-9)
        else:
            is_same = old == new
        if not is_same:
            raise OutputError(
                f"output {path} holds a run that is unfinished and began with another {name} "
                f"({_short(old)}, now {_short(new)}); {advice}."
            )


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 40 else text
