"""Started on W workers by test_lost_owners.py: the command line, in which a worker is lost.

worker_lost_owner.py VICTIM NUMBER WHEN ARGUMENT…: worker VICTIM is killed as the so many'th rows
travel, counted from 1; WHEN is "before" it sends its own, for which the others wait already, or
"after", while they are on their way.
"""

import os
import signal
import sys
import time
from typing import Any

from ekfac_dist.cli import main
from ekfac_dist.runtime.collectives import Collectives


def killed_at(number: int, when: str) -> None:
    """From now on this process is killed at the so many'th sending of rows."""
    send, sent = Collectives.all_to_all, []

    def counted(self: Any, *given: Any) -> Any:
        sent.append(1)
        if len(sent) == number and when == "before":
            time.sleep(1)  # the others have sent theirs
            os.kill(os.getpid(), signal.SIGKILL)
        work = send(self, *given)
        if len(sent) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return work

    Collectives.all_to_all = counted


if __name__ == "__main__":
    victim, number, when, *arguments = sys.argv[1:]
    if os.environ["RANK"] == victim:
        killed_at(int(number), when)
    main(arguments)
