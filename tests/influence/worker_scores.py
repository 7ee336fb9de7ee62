"""Started by test_query_workers.py on W workers: answers queries in several ways.

Factors are shared out among as many of them as `MESHES` says, with models that are whole, or that
FSDP2 shards over all workers.
"""

import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers.families import tiny_model
from helpers.networks import CONFIGS, build, examples
from helpers.task_models import t5, translated_examples
from helpers.workshop import leave
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ekfac_dist import Seq2SeqLM, influence_scores, load_factors
from ekfac_dist.errors import ModelError
from ekfac_dist.models.sharding import is_sharded

ANSWERS = {
    "exact": {"per_token": "top", "per_module": True},
    "eigenbasis": {"normalize": "cosine", "self_influence": True, "per_token": "all"},
    "two stages": {"rank": 2, "rescore": 5, "per_token": "top"},
    "blocks": {"query_memory_gb": 9e-6, "per_layer": True},
    "refined": {"refine": {"method": "cg", "sequences": 7, "iterations": 3}, "per_token": "top"},
    "refined by steps": {
        "refine": {"method": "astra", "batch": 4, "iterations": 3},
        "query_memory_gb": 3e-5,
        "rank": 3,
    },
    "one candidate": {"candidates": [3], "top_k": 1, "per_token": "top"},
}
# What is asked of whole models alone: FSDP2's gathered weights are not there for it.
OF_WHOLE = {"outputs": {"tokens": "outputs", "per_token": "all"}}
# Family, what is asked, and what of the model is tracked: all, or some.
MODELS = {
    "biased": ("llama_bias", [name for name in ANSWERS if "refined" not in name], None),
    "dense": ("llama", ["exact"], None),
    "conv1d": ("gpt2", ["exact", "two stages"], None),
    "experts": ("MixtralForCausalLM", ["exact", "eigenbasis", "two stages"], None),
    "one module": ("llama", ["eigenbasis"], "*.0.mlp.down_proj"),
    "one query, one sequence": ("Starcoder2ForCausalLM", ["exact"], None),
    "encoder-decoder": ("t5", ["eigenbasis"], None),
}
SHARED_OUT = list(MODELS)
# Whose factors are not shared out among workers.
MODELS["whole"] = ("gpt2", ["refined", "refined by steps"], None)
# By the number of workers, by how many share a copy and whether FSDP2 shards the model: the models.
MESHES = {
    2: {
        (1, False): ["biased", "whole"],
        (2, False): SHARED_OUT,
        (1, True): ["dense", "experts"],
        (2, True): ["experts", *SHARED_OUT[-2:]],
    },
    3: {(1, False): ["biased", "whole"], (3, False): SHARED_OUT, (3, True): ["biased"]},
    4: {(2, False): ["experts", "one module"]},
}


def made(name: str) -> nn.Module:
    family = MODELS[name][0]
    if family == "t5":
        return t5()
    if name == "one query, one sequence":  # layers enough for rows to travel between them
        return tiny_model(family, num_hidden_layers=6)
    return build(family) if family in CONFIGS else tiny_model(family)


def task(name: str) -> Seq2SeqLM | None:
    return Seq2SeqLM() if name == "encoder-decoder" else None


def answers_of(name: str, is_sharded: bool) -> list[str]:
    return [*MODELS[name][1], *([] if is_sharded else OF_WHOLE)]


def asked(name: str) -> tuple[list, list]:
    """Queries, two of which are summed and one is a contrast, and training sequences."""
    if name == "encoder-decoder":
        *queries, other = translated_examples(5, seed=2)
        train = translated_examples(11, seed=1)
    else:
        *queries, other = examples(5, seed=2, prompts=True)
        train = examples(11, seed=1, prompts=True)
    queries[1]["group"] = queries[3]["group"] = "pair"
    queries[2]["against"] = other
    return (queries[:1], train[:1]) if name == "one query, one sequence" else (queries, train)


def sharded(model: nn.Module, workers: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (workers,))
    for module in reversed(list(model.modules())):  # inner ones first
        if isinstance(module, nn.ModuleList):
            for layer in module:
                if any(True for _ in layer.parameters()):
                    fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def file_of(root: Path, name: str, workers: int, rank: int, mesh: tuple[int, bool]) -> Path:
    shard, is_sharded = mesh
    return root / f"{name}-{workers}-{rank}-{shard}-{is_sharded}.pt"


def main(root: Path) -> None:
    """Answers everything with the factors in `root`, on all workers; each keeps what it got."""
    accelerator = Accelerator(cpu=True)
    workers, rank = accelerator.num_processes, accelerator.process_index
    for mesh, names in MESHES[workers].items():
        for name in names:
            model = sharded(made(name), workers) if mesh[1] else made(name)
            torch.save(
                answers(root, name, model, mesh[0]), file_of(root, name, workers, rank, mesh)
            )


def answers(root: Path, name: str, model: nn.Module, shard: int = 1) -> dict:
    """Everything that is asked of one model."""
    factors = load_factors(root / name, model=model)
    queries, train = asked(name)
    found = {}
    fixed = {"batch_tokens": 20, "top_k": min(2, len(train)), "shard": shard, "task": task(name)}
    for answer in answers_of(name, is_sharded(model)):
        options = fixed | (ANSWERS | OF_WHOLE)[answer]
        scores = influence_scores(model, factors, queries, train, **options)
        found[answer] = {
            "scores": scores.scores,
            "shares": scores.shares,
            "losses": [*scores.query_losses, *scores.losses],
            "top": [end.columns.tolist() for end in scores.top],
            "num_scans": scores.num_scans,
            "ranks": scores.ranks,
            "damping": scores.damping,
            "self_influence": scores.self_influence,
            "token_scores": scores.token_scores,
            "parts": scores.module_scores if scores.layer_scores is None else scores.layer_scores,
            "details": None if scores.details is None else scores.details.layer_token_scores,
            "residuals": None if scores.refined is None else scores.refined.residuals,
            "exact": [row.exact_scores for row in scores.rescored],
        }
    if is_sharded(model):
        with pytest.raises(ModelError) as raised:
            influence_scores(model, factors, queries, train, **fixed, **OF_WHOLE["outputs"])
        found["refused"] = str(raised.value)
    found["held"] = sorted(factors._lambdas)  # the modules whose factors this worker has read
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
