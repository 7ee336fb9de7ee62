"""Started on W workers by test_resume.py, each with a directory of its own, as on its own host.

worker_hosts.py FOLDER [FLUSH]: worker 1 ends without a word at that flush to its disk.
"""

import os
import sys
from pathlib import Path

from accelerate import PartialState
from helpers.networks import build, examples
from helpers.workshop import leave

from ekfac_dist import estimate_factors
from ekfac_dist.errors import StoreError


def end_at(flush: int) -> None:
    """Ends this process at its so many'th flush."""
    done, fsync = [], os.fsync

    def count(file: int) -> None:
        done.append(file)
        if len(done) == flush:
            os._exit(9)
        fsync(file)

    os.fsync = count


if __name__ == "__main__":
    rank = PartialState(cpu=True).process_index
    if rank == 1 and len(sys.argv) > 2:
        end_at(int(sys.argv[2]))
    host = Path(sys.argv[1]) / f"host{rank}"
    host.mkdir(parents=True, exist_ok=True)
    try:
        estimate_factors(
            build("llama"),
            examples(13, prompts=True),
            output=host,
            batch_tokens=12,
            save_minutes=0,
            accumulate="float64",
        )
    except StoreError:
        assert rank, "worker 0 has the store"
    leave()
