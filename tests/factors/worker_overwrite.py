"""Started by test_overwrite.py: fits a store over what is there, or is killed on the way.

worker_overwrite.py OUTPUT [state|first|swap]: killed instead of saving its first state; after that,
as the journal of the new run begins; or once its manifest is in place.
"""

import os
import signal
import sys

from accelerate import Accelerator
from helpers.networks import build, examples
from helpers.workshop import leave

from ekfac_dist import estimate_factors
from ekfac_dist.factors import replacement
from ekfac_dist.fit import checkpoints

PLACES = {
    "state": (checkpoints, "write_part"),
    "first": (replacement, "Journal"),
    "swap": (replacement, "flush_directory"),
}


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    Accelerator(cpu=True)
    if len(sys.argv) > 2:
        setattr(*PLACES[sys.argv[2]], die)
    settings = {"batch_tokens": 16, "save_minutes": 0, "overwrite": True}
    estimate_factors(build("llama"), examples(9, prompts=True), output=sys.argv[1], **settings)
    leave()
