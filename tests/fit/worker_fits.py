"""Started on W workers by test_workers.py: fits several stores, as somebody's own script would."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from helpers.networks import build, examples
from helpers.task_models import t5, translated_examples
from helpers.workshop import leave

from ekfac_dist import Seq2SeqLM, estimate_factors

FITS = {
    "llama float64": ("llama", 13, {"labels": "data", "accumulate": "float64"}),
    "gpt2 float64 sampled": ("gpt2", 13, {"labels": "sampled", "accumulate": "float64"}),
    "gpt_neox float32": ("gpt_neox", 13, {"labels": "data", "accumulate": "float32"}),
    "llama_bias per token": ("llama_bias", 5, {"refit": "per_token", "accumulate": "float64"}),
    "an empty shard": ("llama", 2, {"labels": "data", "accumulate": "float64"}),
    "one sequence": ("opt", 1, {"labels": "data", "accumulate": "float64"}),
    "sharded": ("gpt2", 6, {"eigen": "sharded", "accumulate": "float64"}),
    "an encoder-decoder": ("t5", 7, {"task": Seq2SeqLM(), "accumulate": "float64"}),
}


def fit_all(output: Path) -> None:
    """Fits everything into `output`, on all workers."""
    for name, (family, number, settings) in FITS.items():
        if family == "t5":
            model, data = t5(), translated_examples(number)
        else:
            model, data = build(family), examples(number, prompts=True)
        if settings["accumulate"] == "float32":
            model = model.float()
        estimate_factors(model, data, output=output / name, batch_tokens=12, **settings)


def main(output: Path) -> None:
    """Fits everything into `output`, and once in memory."""
    accelerator = Accelerator(cpu=True)
    fit_all(output)
    name = next(iter(FITS))
    family, number, settings = FITS[name]
    memory = estimate_factors(
        build(family), examples(number, prompts=True), batch_tokens=12, **settings
    )
    traces = {name: memory.module(name).lambda_OI.sum().item() for name in memory.modules}
    torch.save(traces, output / f"memory-{accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
