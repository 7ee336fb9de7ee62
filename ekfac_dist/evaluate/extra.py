"""The packages that an evaluation needs beside the core's; imports none of them."""

from ekfac_dist.runtime.extras import require_extra


def require_packages() -> None:
    """Refuses to begin without the extra `evaluate`.

    Raises:
        ConfigError: If one of its packages is not installed.
    """
    require_extra("evaluate", ("scipy", "bm25s"))
