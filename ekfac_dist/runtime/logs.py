"""Lines for people, through Python's `logging` under the name "ekfac_dist".

A library's user decides what becomes of them. The command line prints them; see `printed`.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.terminal import show, visible

LOGGER = logging.getLogger("ekfac_dist")


def log_on_main(world: World, line: str) -> None:
    """Logs a line at level INFO, on worker 0 alone."""
    if world.is_main:
        LOGGER.info("%s", line)


@contextmanager
def printed() -> Iterator[None]:
    """Prints what is logged on standard output, a line each, control characters made visible."""
    handler, level, propagates = _PrintingHandler(), LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # a root handler of another library would print each line again
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagates


class _PrintingHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        show(visible(record.getMessage()))
