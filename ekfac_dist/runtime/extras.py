"""The packages of this package's extras; imports none of them."""

import importlib.util
from collections.abc import Iterable

from ekfac_dist.errors import ConfigError


def require_extra(extra: str, modules: Iterable[str]) -> None:
    """Refuses to run a command without the extra of its name.

    Args:
        extra: Name of the extra, and of the command.
        modules: Names of the modules that it brings.

    Raises:
        ConfigError: If one of them is not installed.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{extra} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} "
            f"not installed; install the extra: pip install 'ekfac_dist[{extra}]'."
        )
