"""Checks that all workers of a run have the same settings and software versions."""

from collections.abc import Mapping
from typing import Any

from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.software import NUMERIC_SOFTWARE, software

# Settings whose paths may differ between hosts. What lies there is compared by content, elsewhere.
PATHS = (
    "model.name",
    "model.adapter",
    "data.source",
    "output",
    "factors",
    "index",
    "queries",
    "scores.candidates",
)


def require_same_settings(
    world: World, settings: Mapping[str, Any], noun: str = "settings"
) -> None:
    """Checks that all workers have the same settings and software, before they do any work.

    Args:
        world: The workers.
        settings: All settings that the run depends on, by name. Of those in `PATHS` only whether
            they are given is compared.
        noun: What the error calls the settings, in the plural.

    Raises:
        LaunchError: If they differ, on every worker; the first difference is named with both
            values.
    """
    versions = software()
    world.require_same(
        noun,
        {
            **{name: _without_path(name, value) for name, value in settings.items()},
            "the launcher's fsdp_version": world.fsdp,
            **{f"the version of {name}": versions[name] for name in NUMERIC_SOFTWARE},
        },
    )


def _without_path(name: str, value: Any) -> Any:
    """A setting's value; "given" in place of a path."""
    is_path = name in PATHS and isinstance(value, str)
    return "given" if is_path else value
