"""Started on W workers by test_workers.py: worker 0's decomposition always fails."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import PartialState
from networks import build, examples

from ekfac_dist import estimate_factors
from ekfac_dist.errors import UserError


def fail(matrix):
    raise torch.linalg.LinAlgError("linalg.eigh: the algorithm did not converge")


if __name__ == "__main__":
    if PartialState(cpu=True).process_index == 0:
        torch.linalg.eigh = fail
    try:
        estimate_factors(build("llama"), examples(4), output=sys.argv[1])
    except UserError as error:
        # In one piece: print's line and its end may be parted by another worker's.
        os.write(1, f"WORKER {PartialState().process_index}: {error}\n".encode())
