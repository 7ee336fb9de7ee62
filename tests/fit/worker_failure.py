"""Started on W workers by test_workers.py: one worker's decomposition always fails.

worker_failure.py OUTPUT EIGEN: worker 0's, which decomposes all, or the last one's of its share.
"""

import os
import sys

import torch
from accelerate import PartialState
from helpers.networks import build, examples

from ekfac_dist import estimate_factors
from ekfac_dist.errors import UserError


def fail(matrix):
    raise torch.linalg.LinAlgError("linalg.eigh: the algorithm did not converge")


if __name__ == "__main__":
    state, eigen = PartialState(cpu=True), sys.argv[2]
    if state.process_index == (0 if eigen == "rank0" else state.num_processes - 1):
        torch.linalg.eigh = fail
    try:
        estimate_factors(build("llama"), examples(4), output=sys.argv[1], eigen=eigen)
    except UserError as error:
        # In one piece: print's line and its end may be parted by another worker's.
        os.write(1, f"WORKER {PartialState().process_index}: {error}\n".encode())
