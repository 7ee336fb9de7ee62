"""Runs a worker's script with its heavy imports made without the garbage collector.

    python -m helpers.started SCRIPT ARGUMENT…

A worker of a test does little else than import: a quarter of that is the collector's.
"""

import runpy
import sys
from pathlib import Path

from ekfac_dist.runtime.importing import importing

if __name__ == "__main__":
    with importing():
        import accelerate  # noqa: F401
        import transformers.models.llama.modeling_llama  # noqa: F401

        import helpers.workshop  # noqa: F401
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
