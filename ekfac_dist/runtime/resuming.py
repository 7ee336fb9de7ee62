"""Checks that an unfinished run in an output directory is the one that is to be resumed."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ekfac_dist.config import dotted
from ekfac_dist.errors import OutputError


def require_same_config(
    path: Path, stored: Any, config: Mapping[str, Any], *, may_change: Iterable[str], advice: str
) -> None:
    """Checks that an unfinished run has the same configuration.

    Args:
        path: The run's output directory.
        stored: The configuration in its manifest.
        config: The configuration now.
        may_change: Dotted names of the fields that may differ.
        advice: Clause for the error that says what the user can do.

    Raises:
        OutputError: If other fields differ; the first of them are named with both values.
    """
    before, now = dotted(stored), dotted(json.loads(json.dumps(config)))
    for field in may_change:
        before.pop(field, None)
        now.pop(field, None)
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        differences = ", ".join(
            f"{name} {before.get(name)!r} (now {now.get(name)!r})" for name in changed[:4]
        )
        raise OutputError(
            f"output {path} holds another run, unfinished and of another configuration: "
            f"{differences}{', …' if len(changed) > 4 else ''}; {advice}."
        )


def require_same_beginning(
    path: Path, stored: Any, begins: Mapping[str, Any], *, advice: str
) -> None:
    """Checks that an unfinished run started from the same model, data and other inputs.

    Args:
        path: The run's output directory.
        stored: The inputs that its manifest lists.
        begins: The inputs of this run by name, such as fingerprints: strings, numbers, or nested
            mappings of them. Floats are compared to rounding, since another machine may have
            computed them.
        advice: Clause for the error that says what the user can do.

    Raises:
        OutputError: If an input differs; it is named with both values.
    """
    before, now = dotted(stored if isinstance(stored, dict) else {}), dotted(begins)
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, float) and isinstance(new, float):
            is_same = math.isclose(old, new, rel_tol=1e-9)
        else:
            is_same = old == new
        if not is_same:
            raise OutputError(
                f"output {path} holds a run that is unfinished and began with another {name} "
                f"({_abbreviated(old)}, now {_abbreviated(new)}); {advice}."
            )


def _abbreviated(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 40 else text
