"""Started on W workers by test_lost_owners.py: the command line, which SIGTERM ends in a long step.

worker_long_steps.py STATUSES STEP SLOW ARGUMENT…: in each worker's step STEP, counted from 1,
SIGTERM comes, and worker SLOW takes longer than the others would wait for each other outside a
step. Each worker writes its exit status to STATUSES/RANK.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from ekfac_dist.cli import main
from ekfac_dist.models.capture.hooks import Capture
from ekfac_dist.passes import one_pass
from ekfac_dist.runtime.collectives import LEAVING_SECONDS

RANK = int(os.environ["RANK"])


def ended_in(step: int, slow: int) -> None:
    """From now on SIGTERM comes in the so many'th step of a pass, which is long on one worker."""
    step_of_run, run, done = one_pass._Run._step, Capture.run, []

    def counted(self: Any, *given: Any) -> Any:
        done.append(1)
        return step_of_run(self, *given)

    def ended(self: Any, *given: Any) -> Any:
        if len(done) == step:
            done.append(1)  # this once
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(2 * LEAVING_SECONDS if slow == RANK else 0)
        return run(self, *given)

    one_pass._Run._step, Capture.run = counted, ended


def status_in(file: Path) -> None:
    """From now on the status with which the command ends this process is written to a file."""
    end = os._exit

    def noted(status: int) -> NoReturn:
        file.write_text(str(status))
        end(status)

    os._exit = noted


if __name__ == "__main__":
    statuses, step, slow, *arguments = sys.argv[1:]
    ended_in(int(step), int(slow))
    status_in(Path(statuses, str(RANK)))
    main(arguments)
