"""Started W times by test_processes.py: one worker ends, and the others tell what they learn.

worker_death.py VICTIM exit|kill|announce none|gather|all_reduce
"""

import os
import signal
import sys
import time

import torch

from ekfac_dist.errors import NonFiniteError, PeerError
from ekfac_dist.runtime.processes import World

if __name__ == "__main__":
    victim, manner, collective = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    world = World.start()
    world.barrier()
    if world.rank == victim:
        if manner == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if manner == "announce":
            world.announce_failure(NonFiniteError("NaN in module a."))
        os._exit(3)
    try:
        if collective == "none":
            while True:
                world.check_peers()
                time.sleep(0.1)
        elif collective == "gather":
            world.gather("x" * 1000)
        else:
            world.all_reduce_([torch.ones(1000), torch.ones(3)])
    except PeerError as error:
        print(error, flush=True)
        world.announce_failure(error)  # harmless, even if the key-value store has gone
        os._exit(2)
