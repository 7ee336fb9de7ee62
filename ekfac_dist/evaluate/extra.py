"""The packages that an evaluation needs beside the core's; imports none of them."""

import importlib.util

from ekfac_dist.errors import ConfigError

_PACKAGES = ("scipy", "bm25s")


def require_packages() -> None:
    """Refuses to begin without the extra `evaluate`.

    Raises:
        ConfigError: If one of its packages is not installed.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"evaluate needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} "
            "not installed; install the extra: pip install 'ekfac_dist[evaluate]'."
        )
