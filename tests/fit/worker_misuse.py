"""Started on 2 workers by test_workers.py: mistakes in somebody's own script, and what follows."""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from helpers.networks import VOCAB, build, examples
from torch import nn

from ekfac_dist import CausalLM, estimate_factors
from ekfac_dist.errors import UserError


class Scaled(CausalLM):
    """A task with a setting."""

    def __init__(self, scale: int) -> None:
        self.scale = scale


def say(what: str, error: UserError | None) -> None:
    """One line for each worker and step."""
    # In one piece: print's line and its end may be parted by another worker's.
    os.write(1, f"WORKER {accelerator.process_index} {what}: {error}\n".encode())


def attempt(what: str, **changes) -> None:
    """One fit, which may fail."""
    settings = {"model": build("llama"), "data": examples(8), "batch_tokens": 12} | changes
    try:
        estimate_factors(settings.pop("model"), settings.pop("data"), **settings)
    except UserError as error:
        say(what, error)
    else:
        say(what, None)


def skip_at_a_token(model: nn.Module, token: int) -> None:
    """Leaves the first layer's MLP out of batches in which the token is."""
    mlp = model.model.layers[0].mlp
    whole, skips = mlp.forward, []

    def look(embedding: nn.Module, args: tuple[torch.Tensor], embedded: torch.Tensor) -> None:
        skips[:] = [bool((args[0] == token).any())]

    model.model.embed_tokens.register_forward_hook(look)
    mlp.forward = lambda hidden: 0 * hidden if skips[0] else whole(hidden)


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    output = Path(sys.argv[1])

    # One sequence alone is not finite, so one worker alone meets it, amid its pass.
    broken = build("llama")
    with torch.no_grad():
        broken.model.embed_tokens.weight[0] = torch.inf
    data = examples(40)
    for number, example in enumerate(data):
        ids = example["input_ids"]
        ids[ids == 0] = ids[ids == VOCAB - 1] = 1
        if number == 17:
            ids[0] = 0
    attempt("infinity", model=broken, data=data)
    attempt("afterwards")

    attempt("another seed", seed=rank)
    attempt("another model", model=build("llama", seed=rank))
    headed = build("llama")
    with torch.no_grad():
        headed.lm_head.weight[0] += rank
    attempt("another head", model=headed)
    softened = build("llama")
    softened.config.rms_norm_eps = 1e-6 + rank
    attempt("another configuration", model=softened)
    attempt("other minutes", save_minutes=10 + rank)
    attempt("another task", task=Scaled(rank))
    attempt("other data", data=examples(8, seed=rank))
    attempt("another shard", shard=1 + rank)
    attempt("other checkpointing", gradient_checkpointing=bool(rank))
    attempt("a shard of three", shard=3, output=output / "three")
    attempt("a shard of none", shard=0, output=output / "none")
    attempt("a shard in words", shard="two", output=output / "two")
    attempt("checkpointing of one", gradient_checkpointing=1)
    attempt("output on one", output=output / "one" if rank == 0 else None)
    attempt("afterwards again", output=output / "both")

    prepared = accelerator.prepare(build("llama"))
    attempt("a prepared model", model=prepared, data=examples(7), output=output / "prepared")
    attempt("a plain model", data=examples(7), output=output / "plain")

    # Last: a worker that fails between collectives leaves the others.
    skipping = build("llama")
    skip_at_a_token(skipping, VOCAB - 1)
    data[17]["input_ids"][0] = VOCAB - 1
    shared_out = {"shard": 2, "output": output / "skipping", "batch_tokens": 1}
    attempt("a module that some batches skip", model=skipping, data=data, **shared_out)
