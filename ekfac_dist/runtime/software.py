"""Versions of the packages that results depend on, for manifests and comparisons."""

import importlib.metadata

_SOFTWARE = ("ekfac_dist", "torch", "transformers", "accelerate", "safetensors")
# Packages whose version can change numerical results; all workers must have the same.
NUMERIC_SOFTWARE = ("ekfac_dist", "torch", "transformers")


def software() -> dict[str, str]:
    """The installed versions, by package name."""
    return {name: importlib.metadata.version(name) for name in _SOFTWARE}
