"""Started on W workers by test_second_level.py: a fit whose sums are flushed every few sequences.

worker_second_level.py OUTPUT [FLUSH]: worker 1 ends without a word at that flush to its disk.
"""

import sys

from accelerate import PartialState
from helpers.networks import build, examples
from helpers.workshop import leave
from worker_hosts import end_at

from ekfac_dist import estimate_factors
from ekfac_dist.curvature import long_sums

if __name__ == "__main__":
    long_sums.FLUSH_AFTER = 4
    if PartialState(cpu=True).process_index == 1 and len(sys.argv) > 2:
        end_at(int(sys.argv[2]))
    estimate_factors(
        build("llama"), examples(25), output=sys.argv[1], batch_tokens=16, save_minutes=0
    )
    leave()
