"""Started by test_heartbeat.py, on each of several workers without a launcher.

worker_heartbeat.py VICTIM SIGNAL program|script [PID]: that worker sends the signal to itself, or
to the process PID; the others wait for it, in a program that owns its process or in somebody's
script.
"""

import os
import signal
import sys
import time

from ekfac_dist.errors import PeerError
from ekfac_dist.runtime.heartbeat import heartbeat
from ekfac_dist.runtime.processes import World

if __name__ == "__main__":
    victim, number, owner = int(sys.argv[1]), signal.Signals[sys.argv[2]], sys.argv[3]
    world = World.start()
    with heartbeat(world, beat_seconds=0.1, owns_process=owner == "program"):
        time.sleep(1)  # every one has been seen
        world.barrier()
        if world.rank == victim:
            os.kill(int(sys.argv[4]) if len(sys.argv) > 4 else os.getpid(), number)
        time.sleep(3)  # longer than anybody's patience, and nobody has lost it
        try:
            world.barrier()
        except PeerError as error:  # another has noticed first, and said so; or in a script
            if owner == "script":
                print(error, flush=True)
            os._exit(error.status)
    print("went on", flush=True)
    os._exit(0)
