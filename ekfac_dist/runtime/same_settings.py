"""What all workers of a run must have been given alike: its settings, and the software."""

from collections.abc import Mapping
from typing import Any

from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.software import NUMERIC_SOFTWARE, software

# Where something is may differ from host to host; what is there is compared by its content.
PATHS = (
    "model.name",
    "model.adapter",
    "data.source",
    "output",
    "factors",
    "queries",
    "scores.candidates",
)


def require_same_settings(
    world: World, settings: Mapping[str, Any], what: str = "settings"
) -> None:
    """Refuses workers of different settings, or software, before they do any work.

    Args:
        world: The workers.
        settings: Whatever the run depends on, by name; of paths only whether they are given.
        what: What these are called in the error.

    Raises:
        LaunchError: They differ, on every worker; the first setting is named with both values.
    """
    versions = software()
    world.require_same(
        what,
        {
            **{name: _compared(name, value) for name, value in settings.items()},
            "the launcher's fsdp_version": world.fsdp,
            **{f"the version of {name}": versions[name] for name in NUMERIC_SOFTWARE},
        },
    )


def _compared(name: str, value: Any) -> Any:
    is_path = name in PATHS and isinstance(value, str)
    return "given" if is_path else value
