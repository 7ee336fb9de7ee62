"""The heavy imports of a command, without the garbage collector.

PyTorch and Transformers make some 700,000 objects that live as long as the process. Looking through
them, again and again while they become more, takes the collector a fifth of the time of the
imports; and each full collection of a run would look through them once more.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Context for a process's first imports of PyTorch and what needs it.

    What they made is left out of all later collections. Where PyTorch is imported already, as in a
    program that runs a command as a function, nothing is changed.
    """
    if "torch" in sys.modules:
        yield
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
