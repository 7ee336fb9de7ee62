"""Started by test_heartbeat.py, on each of several workers without a launcher.

worker_heartbeat.py VICTIM: that worker stops itself; the others wait for it.
"""

import os
import signal
import sys
import time

from ekfac_dist.errors import PeerError
from ekfac_dist.runtime.heartbeat import heartbeat
from ekfac_dist.runtime.processes import World

if __name__ == "__main__":
    world = World.start()
    with heartbeat(world, beat_seconds=0.1):
        time.sleep(1)  # every one has been seen
        world.barrier()
        if world.rank == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(3)  # longer than anybody's patience, and nobody has lost it
        try:
            world.barrier()
        except PeerError as error:  # another has noticed first, and said so
            os._exit(error.status)
    print("went on", flush=True)
    os._exit(0)
