"""Started on two workers by test_first_half_hour.py: one looks up a token that there is none of.

worker_out_of_range.py RANK ARGUMENT…: in that worker's second step of a pass.
"""

import os
import sys
from typing import Any

from ekfac_dist.cli import main
from ekfac_dist.models.capture.hooks import Capture

if __name__ == "__main__":
    victim, *arguments = sys.argv[1:]
    run, steps = Capture.run, []

    def wrong(self: Any, batch: Any, rule: Any) -> Any:
        steps.append(1)
        if len(steps) == 4 and os.environ["RANK"] == victim:
            batch.inputs["input_ids"].fill_(10**6)
        return run(self, batch, rule)

    Capture.run = wrong
    sys.exit(main(arguments))
