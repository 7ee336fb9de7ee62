"""Versions of the packages that results depend on."""

import importlib.metadata

_SOFTWARE = ("ekfac_dist", "torch", "transformers", "accelerate", "safetensors")
# Those that numbers depend on.
NUMERIC_SOFTWARE = ("ekfac_dist", "torch", "transformers")


def software() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    return {name: importlib.metadata.version(name) for name in _SOFTWARE}
