"""What a row of scores takes of memory: what is said before a run, and nothing beside it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

OUTPUTS, INPUTS, MODULES = 1024, 256, 6
WORKER = Path(__file__).with_name("worker_query_memory.py")


@pytest.mark.parametrize(
    ("rows", "options", "elements"),
    [
        (40, {}, OUTPUTS * INPUTS),
        (40, {"self_influence": True}, OUTPUTS * INPUTS),
        (160, {"rank": 32}, 32 * (OUTPUTS + INPUTS)),
        (160, {"rank": 32, "self_influence": True}, 32 * (OUTPUTS + INPUTS)),
        (160, {"rank": 32, "per_token": "all"}, 32 * (OUTPUTS + INPUTS)),
    ],
)
def test_more_rows_take_their_gradients_and_nothing_beside(rows, options, elements):
    # Freed memory goes back at once, so that a peak is that of what is held.
    paths = [str(WORKER.parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "500000",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [sys.executable, str(WORKER), str(rows), json.dumps(options)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    planned = 4 * MODULES * elements * (rows - 1)
    assert int(done.stdout) == pytest.approx(planned, rel=0.15)
