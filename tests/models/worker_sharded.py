"""Started on W workers by test_sharded.py: fits models that are whole, then sharded by FSDP2.

worker_sharded.py OUTPUT NAME…: of each fit the stores `whole/NAME` and `sharded/NAME` there.
"""

import sys
from itertools import product
from pathlib import Path

import torch
from accelerate import PartialState
from helpers.families import tiny_model
from helpers.networks import CONFIGS, build, examples
from helpers.task_models import t5, translated_examples
from helpers.workshop import leave, logged
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ekfac_dist import Seq2SeqLM, estimate_factors
from ekfac_dist.data.tokenized_examples import from_examples
from ekfac_dist.models.capture.prepare import prepared
from ekfac_dist.models.capture.tasks import CAUSAL_LM
from ekfac_dist.models.find.on_workers import find
from ekfac_dist.passes.sequences import why_not_checkpointed
from ekfac_dist.runtime.processes import World

SETTINGS = {"accumulate": "float64", "batch_tokens": 12}
# Family, number of sequences, arguments.
# Of each fit its family, number of sequences, and arguments.
FITS = {
    "gated": ("llama", 13, {"labels": "sampled"}),
    "conv1d, tied": ("gpt2", 13, {"labels": "data"}),
    "an empty shard": ("llama_bias", 1, {}),
    "partitions": ("gpt_neox", 9, {"partitions": 4, "labels": "data"}),
    "per token, blocks": ("opt", 7, {"refit": "per_token", "blocks": 2, "eigen": "sharded"}),
    "experts": ("MixtralForCausalLM", 9, {"labels": "data", "partitions": 5}),
    "embeddings and head apart": ("mistral", 9, {"labels": "data"}),
    "encoder-decoder": ("t5", 7, {"task": Seq2SeqLM()}),
    "checkpointing": ("qwen2", 8, {"labels": "data"}),
    # The sharded model's alone; the whole one's workers each hold all factors and activations.
    "layers computed again": ("llama", 9, {}),
    "experts computed again": ("Qwen3MoeForCausalLM", 9, {"labels": "data"}),
    "shared out": ("llama_bias", 13, {"labels": "data"}),
    "shared out and computed again": ("llama", 9, {}),
    "an empty shard, shared out": ("llama", 1, {}),
    "experts shared out": ("MixtralForCausalLM", 9, {"labels": "data"}),
    "experts shared out and computed again": ("Qwen3MoeForCausalLM", 9, {"labels": "data"}),
}


def made(name: str) -> nn.Module:
    family = FITS[name][0]
    if family == "t5":
        return t5()
    model = build(family) if family in CONFIGS else tiny_model(family)
    if name == "checkpointing":
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def sharded(model: nn.Module, name: str) -> nn.Module:
    mesh = init_device_mesh("cpu", (PartialState().num_processes,))
    if name == "embeddings and head apart":  # as Accelerate does
        fully_shard(model.get_input_embeddings(), mesh=mesh)
        last = [model.model.norm, model.lm_head]
        fully_shard(last, mesh=mesh, reshard_after_forward=False)
    for module in reversed(list(model.modules())):  # inner ones first
        if isinstance(module, nn.ModuleList):
            for layer in module:
                if any(True for _ in layer.parameters()):
                    fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def told_apart(world: World) -> None:
    """Whether layers can be computed again is found out together, and the model goes on."""
    model, data = sharded(build("llama"), "proof"), from_examples(examples(4))
    last = model.model.layers[1].mlp
    plain, calls = last.act_fn.forward, []

    def counting(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return plain(x) * (2.0 if len(calls) == 3 else 1.0)

    def failing(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:  # in the backward of the run that computes layers again
            raise ValueError("not again")
        return plain(x)

    with prepared(model):
        modules = find(model, None, world).modules
        for forward, reason in (
            (plain, None),
            (counting, "model.layers.1.mlp.down_proj changes"),
            (failing, "(not again)"),
            (plain, None),
        ):
            last.act_fn.forward = forward
            calls.clear()
            found = why_not_checkpointed(model, modules, data, CAUSAL_LM, world)
            assert found == reason or reason in found, found


if __name__ == "__main__":
    PartialState(cpu=True)
    root, *names = sys.argv[1:]
    for kind, name in product(("whole", "sharded"), names):
        family, number, settings = FITS[name]
        model = made(name)
        if kind == "sharded":
            model = sharded(model, name)
            if family in CONFIGS:
                with torch.no_grad():  # which leaves some weights gathered
                    model(input_ids=torch.ones(1, 3, dtype=torch.int64))
        data = translated_examples(number) if family == "t5" else examples(number, prompts=True)
        repeats = kind == "sharded" and name.endswith("computed again")
        shares = kind == "sharded" and "shared out" in name
        if repeats or shares:
            shard = PartialState().num_processes if shares else 1
            settings = settings | {"gradient_checkpointing": repeats, "shard": shard}
        flags = [parameter.requires_grad for parameter in model.parameters()]
        output = Path(root, kind, name)
        with logged() as lines:
            estimate_factors(model, data, output=output, **SETTINGS, **settings)
        if PartialState().is_main_process:
            assert repeats == any("one layer at a time" in line for line in lines)
            assert shares == any("shared out" in line for line in lines)
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert all(parameter.grad is None for parameter in model.parameters())
    told_apart(World.start())
    torch.distributed.barrier()
    leave()
