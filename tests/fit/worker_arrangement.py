"""Started on 2 workers by test_arrangement_on_workers.py: fits in less and less free memory.

worker_arrangement.py OUTPUT: every worker writes to `said-RANK.json` there, of each fit by name,
its arrangement, what it said, and its refusal.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from helpers.networks import build, examples
from helpers.workshop import leave, logged

from ekfac_dist import estimate_factors
from ekfac_dist.errors import UserError
from ekfac_dist.fit import checkpoints, fit_factors
from ekfac_dist.passes import step_memory
from ekfac_dist.runtime import preemption

NUM_EXAMPLES = 13
PLENTY = 10**12
LESS = [400_000 - 20_000 * k for k in range(19)]  # of both workers together
MIDDLE = 160_000
SETTINGS = {"accumulate": "float64", "batch_tokens": 64, "labels": "data", "save_minutes": 0}


@contextmanager
def free_memory(of_host: int) -> Iterator[dict[str, Any]]:
    """Replaces what a host has free; notes the arrangement, and what is said."""
    note: dict[str, Any] = {}
    free, arranged = step_memory.available_bytes, fit_factors.arranged

    def noting(*given: Any) -> Any:
        found = arranged(*given)
        note["arrangement"] = {
            "number": len(found.groups),
            "shard": found.shard,
            "checkpoints": found.checkpoints,
            "step_tokens": found.step_tokens,
        }
        return found

    step_memory.available_bytes = lambda device: of_host
    fit_factors.arranged = noting
    try:
        with logged() as note["lines"]:
            yield note
    finally:
        step_memory.available_bytes, fit_factors.arranged = free, arranged


def attempt(output: Path, of_host: int) -> dict[str, Any]:
    """A fit, with what it came to."""
    with free_memory(of_host) as note:
        try:
            data = examples(NUM_EXAMPLES, prompts=True)
            estimate_factors(build("llama"), data, output=output, **SETTINGS)
        except UserError as error:
            note["refusal"] = str(error)
            note["status"] = error.status
    return note


def stopped(output: Path, of_host: int, after: int) -> dict[str, Any]:
    """A fit to which SIGTERM comes in the so many'th step of this worker."""
    after_step, done = checkpoints._SavedState.after_step, []

    def count(state: Any) -> None:
        done.append(1)
        preemption._is_requested = len(done) == after or preemption._is_requested
        after_step(state)

    checkpoints._SavedState.after_step = count
    try:
        return attempt(output, of_host)
    finally:
        checkpoints._SavedState.after_step = after_step
        preemption._is_requested = False


if __name__ == "__main__":
    rank = Accelerator(cpu=True).process_index
    root = Path(sys.argv[1])
    notes = {str(free): attempt(root / str(free), free) for free in (PLENTY, *LESS)}
    notes["unequal"] = attempt(root / "unequal", PLENTY if rank == 0 else MIDDLE)
    notes["stopped"] = stopped(root / "stopped", MIDDLE, 2)
    notes["gone on"] = attempt(root / "stopped", PLENTY)
    (root / f"said-{os.environ['RANK']}.json").write_text(json.dumps(notes))
    leave()
