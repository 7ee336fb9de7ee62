"""Fits that are ended by SIGTERM amid a pass and gone on with by other workers, or otherwise.

On W workers, started by test_layouts.py: worker_layouts.py ROOT STARTS, a JSON list of starts.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from helpers.families import tiny_model
from helpers.networks import CONFIGS, build, examples
from helpers.workshop import leave

from ekfac_dist import estimate_factors
from ekfac_dist.errors import Preempted, UserError
from ekfac_dist.fit import checkpoints
from ekfac_dist.passes.context import PassContext
from ekfac_dist.runtime import preemption

NUM_EXAMPLES = 13
# Of each fit the family of its model, and arguments.
FITS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("llama_bias", {}),
    "experts": ("MixtralForCausalLM", {"labels": "data"}),
    "in blocks": ("opt", {"blocks": 2, "partitions": 2}),
    "layers computed again": ("llama", {"gradient_checkpointing": True}),
}


def run(root: Path, starts: list[dict[str, Any]]) -> None:
    """One start after another.

    Args:
        root: Where the stores are; worker 0 adds to `NAME.json` there, for each start, which
            sequences all workers took up in it.
        starts: Of each start its store's `name`, the `fit`, the `shard`, and after how many steps
            of the worker SIGTERM comes; null: never.
    """
    for start in starts:
        ends_after = start["steps"]
        with stopped_after(ends_after) as taken:
            try:
                fit(root / start["name"], start["fit"], start["shard"])
            except UserError as error:  # this worker's end, or that of another
                if ends_after is None or error.status != Preempted.status:
                    raise
            else:
                assert ends_after is None, f"{start} has ended before SIGTERM came"
        note = root / f"{start['name']}-{len(list(root.glob(start['name'] + '-*.json')))}"
        if launched() > 1:
            of_all: list[list[int]] = [[]] * launched()
            dist.all_gather_object(of_all, taken)
            taken = [index for own in of_all for index in own]
        if os.environ.get("RANK", "0") == "0":
            note.with_suffix(".json").write_text(json.dumps(sorted(taken)))


def fit(output: Path, name: str, shard: int) -> None:
    family, settings = FITS[name]
    model = build(family) if family in CONFIGS else tiny_model(family)
    arguments = {"accumulate": "float64", "batch_tokens": 12, "save_minutes": 0, "shard": shard}
    data = examples(NUM_EXAMPLES, prompts=True)
    estimate_factors(model, data, output=output, **arguments | settings)


def launched() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def stopped_after(steps: int | None) -> Iterator[list[int]]:
    """Within it SIGTERM comes in the so many'th step; lists the sequences that are taken up."""
    after_step, prefetched = checkpoints._SavedState.after_step, PassContext.prefetched
    taken, done = [], []

    def count_step(state: Any) -> None:
        done.append(1)
        preemption._is_requested = len(done) == steps or preemption._is_requested
        after_step(state)

    def count_sequences(context: Any, batches: Any) -> Iterator[Any]:
        for indices, batch in prefetched(context, batches):
            taken.extend(indices)
            yield indices, batch

    checkpoints._SavedState.after_step = count_step
    PassContext.prefetched = count_sequences
    try:
        yield taken
    finally:
        checkpoints._SavedState.after_step, PassContext.prefetched = after_step, prefetched
        preemption._is_requested = False


if __name__ == "__main__":
    Accelerator(cpu=True)
    run(Path(sys.argv[1]), json.loads(sys.argv[2]))
    leave()
