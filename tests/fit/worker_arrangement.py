"""Started on 2 workers by test_arrangement_on_workers.py: fits in less and less free memory.

worker_arrangement.py OUTPUT: every worker writes to `said-RANK.json` there, of each fit by name,
its arrangement, what of it the journal holds, what it said, and its refusal.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from helpers.networks import VOCAB, build, examples
from helpers.workshop import leave, logged, tiny_llama_config
from torch import nn
from transformers import AutoModelForCausalLM

from ekfac_dist import estimate_factors
from ekfac_dist.errors import UserError
from ekfac_dist.fit import checkpoints, fit_factors
from ekfac_dist.passes import step_memory
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.journal import Journal

NUM_EXAMPLES = 13
PLENTY = 10**12
LESS = [400_000 - 20_000 * k for k in range(19)]  # of both workers together
MIDDLE = 160_000
# In steps that cannot be smaller, of a model whose factors are much of what is held.
WIDE = [900_000 - 40_000 * k for k in range(11)]
SETTINGS = {"accumulate": "float64", "batch_tokens": 64, "labels": "data", "save_minutes": 0}


def wide() -> nn.Module:
    config = tiny_llama_config(vocab_size=VOCAB, hidden_size=32, intermediate_size=48)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).double().eval()


@contextmanager
def free_memory(of_host: int, output: Path) -> Iterator[dict[str, Any]]:
    """Replaces what a host has free; notes how a fit is arranged, and what it says."""
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
        records = Journal(output).records
        note["journal"] = [record for record in records if record.get("stage") == "groups"]
        return found

    step_memory.available_bytes = lambda device: of_host
    fit_factors.arranged = noting
    try:
        with logged() as note["lines"]:
            yield note
    finally:
        step_memory.available_bytes, fit_factors.arranged = free, arranged


def attempt(
    output: Path, of_host: int, model: nn.Module | None = None, **settings: Any
) -> dict[str, Any]:
    """A fit, with what it came to."""
    with free_memory(of_host, output) as note:
        try:
            data = examples(NUM_EXAMPLES, prompts=True)
            settings = SETTINGS | settings
            estimate_factors(model or build("llama"), data, output=output, **settings)
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
    notes |= {
        f"wide {free}": attempt(root / f"wide {free}", free, wide(), batch_tokens=8)
        for free in (PLENTY, *WIDE)
    }
    notes["unequal"] = attempt(root / "unequal", PLENTY if rank == 0 else MIDDLE)
    least = min(free for free in LESS if "refusal" not in notes[str(free)])
    for free in (MIDDLE, least):
        store = root / f"stopped {free}"
        notes[f"stopped {free}"] = stopped(store, free, 2)
        notes[f"stopped again {free}"] = stopped(store, LESS[-1], 2)
        notes[f"gone on {free}"] = attempt(store, PLENTY)
    (root / f"said-{os.environ['RANK']}.json").write_text(json.dumps(notes))
    leave()
