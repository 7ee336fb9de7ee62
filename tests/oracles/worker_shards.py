"""Started on W workers by test_shards.py: fits the same factors, shared out among some of them."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from helpers.families import tiny_model
from helpers.networks import CONFIGS, build, examples
from helpers.workshop import leave
from torch import nn

from ekfac_dist import estimate_factors
from ekfac_dist.passes import schedule
from ekfac_dist.runtime.collectives import Collectives

SETTINGS = {"accumulate": "float64", "batch_tokens": 16}
# Family, number of sequences, arguments.
FITS = {
    "dense": ("llama", 13, {"labels": "data"}),
    "sampled labels": ("gpt_neox", 9, {"labels": "sampled"}),
    "conv1d, bias, per token": ("gpt2", 9, {"refit": "per_token"}),
    "experts": ("MixtralForCausalLM", 7, {"labels": "data"}),
    "experts that some workers reach": ("DeepseekV3ForCausalLM", 2, {"labels": "data"}),
    "no refit, blocks": ("opt", 7, {"refit": "none", "blocks": 2}),
    "blocks": ("llama_bias", 7, {"blocks": 2}),
    "empty shards": ("llama_bias", 1, {"labels": "data"}),
    "repeated layers": ("llama", 9, {"gradient_checkpointing": True, "labels": "data"}),
    "repeated experts": (
        "MixtralForCausalLM",
        7,
        {"gradient_checkpointing": True, "labels": "data"},
    ),
    "partitions": ("gpt_neox", 9, {"partitions": 3, "labels": "data"}),
}


def made(name: str) -> nn.Module:
    family = FITS[name][0]
    return build(family) if family in CONFIGS else tiny_model(family)


WAITS = "waits.json"  # how often worker 0 waits for others: in a fit of few steps, and of more
# Fits whose windows travel in as many rounds as there are owners to send to.
IN_ROUNDS = ("dense", "experts")


def fit(name: str, output: Path, shard: int) -> None:
    """Fits one model, on all workers."""
    _, number, settings = FITS[name]
    data = examples(number, prompts=True)
    estimate_factors(made(name), data, output=output, shard=shard, **SETTINGS, **settings)


def waits(number: int, output: Path, shard: int) -> int:
    """How often worker 0 waits for the others in a fit of some sequences."""
    waited, wait_for_all = [], Collectives.wait_for_all

    def counted(world: Collectives) -> None:
        waited.append(1)
        wait_for_all(world)

    Collectives.wait_for_all = counted
    data = examples(number, prompts=True)
    estimate_factors(made("dense"), data, output=output, shard=shard, labels="data", **SETTINGS)
    Collectives.wait_for_all = wait_for_all
    return len(waited)


def main(output: Path, shard: int, names: Sequence[str]) -> None:
    """Fits some models into `output`, on all workers."""
    workers = Accelerator(cpu=True).num_processes
    for name in names:
        fit(name, output / name, shard)
    schedule._ROUND_BYTES = 1
    for name in IN_ROUNDS:
        fit(name, output / "in rounds" / name, workers)
    counts = [waits(number, output / f"of {number}", shard) for number in (9, 27)]
    if Accelerator().is_main_process:
        (output / WAITS).write_text(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    leave()
