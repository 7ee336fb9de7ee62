"""Started on W workers by test_workers.py: a fit with a shard that does not fit their number.

worker_wrong_shard.py OUTPUT SHARD: every worker says the refusal's exit status and its sentence.
"""

import os
import sys

from accelerate import Accelerator
from helpers.networks import build, examples
from helpers.workshop import leave

from ekfac_dist import estimate_factors
from ekfac_dist.errors import ConfigError

if __name__ == "__main__":
    rank = Accelerator(cpu=True).process_index
    try:
        estimate_factors(build("llama"), examples(4), output=sys.argv[1], shard=int(sys.argv[2]))
    except ConfigError as error:
        # In one piece: print's line and its end may be parted by another worker's.
        os.write(1, f"WORKER {rank}: {error.status} {error}\n".encode())
    leave()
