"""LoRA adapters: their matrices' factors and scores against dense autograd, and what is refused."""

import json
import os
import shutil
import subprocess
import sys

import peft
import pytest
import torch
from helpers.dense import dense_influence, dense_modules, relative
from helpers.directions import flat, gauss_newton, runs_of
from helpers.networks import build, examples, shifted
from helpers.workshop import run_here, save_tiny_llama, texts, with_helpers, write_jsonl
from transformers import AutoModelForCausalLM

from ekfac_dist import estimate_factors, influence_scores, load_factors
from ekfac_dist.errors import ModelError, StoreError
from ekfac_dist.models.load.adapters import with_adapter

EXACT = 1e-10
FIT = {"labels": "data", "accumulate": "float64", "batch_tokens": 24}


def adapted(family="llama", targets=("gate_proj", "up_proj", "down_proj", "q_proj"), seed=3):
    """A model with an adapter of rank 3, random on both sides."""
    settings = peft.LoraConfig(
        r=3, lora_alpha=6, lora_dropout=0.1, target_modules=list(targets), task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(build(family), settings).double().eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize(
    ("family", "targets"),
    [("llama", ("gate_proj", "up_proj", "down_proj", "q_proj")), ("gpt2", ("c_fc", "c_proj"))],
)
def test_an_adapters_matrices_are_as_dense_autograd_has_them(family, targets):
    model, data = adapted(family, targets), examples(10, prompts=True)
    factors = estimate_factors(model, data, **FIT)
    names = list(factors.modules)
    assert all(".lora_" in name and ".mlp." in name for name in names)
    assert len(names) == 2 * 2 * (3 if family == "llama" else 2)
    coverage = factors.manifest["coverage"]
    assert coverage["tracked_parameters"] == coverage["mlp_parameters"]
    oracle = dense_modules(model, [shifted(e) for e in data], names)
    for name, dense in oracle.items():
        fitted = factors.module(name)
        Q = torch.kron(fitted.basis_OO, fitted.basis_II)
        diagonal = torch.diag(Q.T @ dense.F @ Q)
        assert relative(fitted.lambda_OI.flatten(), diagonal) < EXACT
    if family == "llama":  # gate and up read one tensor, and so do their adapters
        shared = factors.modules[next(n for n in names if "up_proj.lora_A" in n)]
        assert not shared.leads


def test_an_adapters_scores_are_refined():
    model, data = adapted("gpt2", ("c_fc", "c_proj")), examples(6, prompts=True)
    factors = estimate_factors(model, data, **FIT)
    refine = {"method": "cg", "iterations": 500, "tolerance": 1e-10}
    found = influence_scores(model, factors, data[:2], data, damping=20.0, refine=refine, top_k=2)
    sequences = [shifted(row) for row in data]
    G = gauss_newton(model, factors.modules, runs_of(model, sequences))
    dense = dense_modules(model, sequences, list(factors.modules))
    gradients = flat({name: torch.stack(module.gradients) for name, module in dense.items()})
    means = [factors.module(name).lambda_OI.mean() for name in factors.modules]
    sizes = [module.num_parameters for module in factors.modules.values()]
    damping = torch.cat([20 * mean.expand(n) for mean, n in zip(means, sizes, strict=True)])
    expected = gradients[:2] @ torch.linalg.solve(G + torch.diag(damping), gradients.T)
    assert relative(found.scores, expected) < 1e-8


def test_scores_of_an_adapter_are_those_of_dense_gradients():
    model, train = adapted(), examples(10)
    queries = examples(3, seed=5, prompts=True)
    factors = estimate_factors(model, train, **FIT)
    answer = influence_scores(model, factors, queries, train, top_k=3)
    names = list(factors.modules)
    of_train, of_queries = (
        dense_modules(model, [shifted(e) for e in data], names) for data in (train, queries)
    )
    expected = dense_influence(of_train, of_queries)
    assert relative(answer.scores.double(), expected) < 1e-6


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model, an adapter for it, and text."""
    directory = tmp_path_factory.mktemp("adapter")
    model = save_tiny_llama(directory / "model")
    from transformers import AutoModelForCausalLM

    settings = peft.LoraConfig(
        r=2, target_modules=["gate_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    adapter = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    adapter.save_pretrained(directory / "lora")
    data = write_jsonl(directory / "text.jsonl", [{"text": text} for text in texts(12)])
    return directory, model, data


@pytest.mark.parametrize("merge", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_command_fits_and_queries_an_adapted_model(saved, tmp_path, merge):
    directory, model, data = saved
    store, scores = tmp_path / "store", tmp_path / "scores"
    done = run_here(
        [
            *("estimate", "--model.name", model, "--data.source", data, "--output", store),
            *("--model.adapter", directory / "lora", "--model.merge_adapter", str(merge).lower()),
        ]
    )
    assert done.returncode == 0, done.stderr
    names = list(load_factors(store).modules)
    assert len(names) == (6 if merge else 8)
    assert all(("lora_" in name) is not merge for name in names)
    write_jsonl(tmp_path / "queries.jsonl", [{"text": "The worker reads."}])
    done = run_here(
        [
            *("query", "--factors", store, "--queries", tmp_path / "queries.jsonl"),
            *("--output", scores, "--scores.top_k", "2"),
        ]
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((scores / "manifest.json").read_text())["num_queries"] == 1


def test_an_adapter_that_cannot_be_used_is_refused_in_a_sentence(saved, tmp_path):
    directory, model, _ = saved

    def load():
        return AutoModelForCausalLM.from_pretrained(model)

    with pytest.raises(ModelError, match=r"without an adapter_config\.json"):
        with_adapter(load(), str(model), merge=False)
    broken = shutil.copytree(directory / "lora", tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"is damaged|could not be put on"):
        with_adapter(load(), str(broken), merge=False)
    (broken / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors"):
        with_adapter(load(), str(broken), merge=False)
    with pytest.raises(ModelError, match="could not be put on GPT2LMHeadModel"):
        with_adapter(build("gpt2"), str(directory / "lora"), merge=False)
    fewer = shutil.copytree(directory / "lora", tmp_path / "fewer")
    settings = json.loads((fewer / "adapter_config.json").read_text())
    settings["target_modules"] = ["gate_proj", "down_proj", "up_proj"]
    (fewer / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"is not of this model: the adapter lacks .*up_proj"):
        with_adapter(load(), str(fewer), merge=False)


def trained(**changes):
    """An adapter on gate projections with something else that was trained beside it."""
    settings = {"r": 2, "target_modules": ["gate_proj"], "task_type": "CAUSAL_LM", **changes}
    model = peft.get_peft_model(build("llama_bias"), peft.LoraConfig(**settings)).double().eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def test_what_was_trained_beside_the_matrices_is_tracked_or_told_of():
    model, data = trained(modules_to_save=["down_proj"], bias="lora_only"), examples(6)
    factors = estimate_factors(model, data, **FIT)
    assert sum("modules_to_save" in name for name in factors.modules) == 2
    coverage = factors.manifest["coverage"]
    assert set(coverage["skipped"].values()) == {"trained with the adapter, and no matrix of it"}
    assert all(name.endswith("bias") for name in coverage["skipped"])
    assert coverage["tracked_mlp_parameters"] < coverage["mlp_parameters"]
    oracle = dense_modules(model, [shifted(e) for e in data], list(factors.modules))
    for name, dense in oracle.items():
        fitted = factors.module(name)
        Q = torch.kron(fitted.basis_OO, fitted.basis_II)
        diagonal = torch.diag(Q.T @ dense.F @ Q)
        assert relative(fitted.lambda_OI.flatten(), diagonal) < EXACT


def test_an_adapter_of_attention_alone_is_refused_with_the_reason():
    with pytest.raises(ModelError, match=r"has no matrix in an MLP; name .*'\*\.lora_\*'"):
        estimate_factors(trained(target_modules=["q_proj"]), examples(3))


def test_factors_are_of_the_weights_beside_the_adapter_and_of_its_scale(tmp_path):
    data = examples(4)
    adapted().save_pretrained(tmp_path / "lora")

    def load(seed=0, **changes):
        path = tmp_path / "lora" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return with_adapter(build("llama", seed), str(tmp_path / "lora"), merge=False).double()

    estimate_factors(load(), data, output=tmp_path / "factors")
    load_factors(tmp_path / "factors", model=load())
    for other in (load(seed=7), load(lora_alpha=60)):
        with pytest.raises(StoreError, match="its weights differ"):
            load_factors(tmp_path / "factors", model=other)


def test_an_adapter_on_the_hub_is_looked_at_as_well(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--me--lora" / "snapshots" / "abc"
    refs = tmp_path / "models--me--lora" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("abc")
    adapted(targets=("gate_proj",)).save_pretrained(snapshot)
    settings = json.loads((snapshot / "adapter_config.json").read_text())
    settings["target_modules"] = ["gate_proj", "down_proj"]
    (snapshot / "adapter_config.json").write_text(json.dumps(settings))
    code = (
        "from helpers.networks import build;"
        "from ekfac_dist.models.load.adapters import with_adapter;"
        "with_adapter(build('llama'), 'me/lora', merge=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **with_helpers(), "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "me/lora is not of this model: the adapter lacks" in done.stderr


def test_embeddings_saved_with_an_adapter_do_no_harm(tmp_path):
    adapted().save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    with_adapter(build("llama"), str(tmp_path / "lora"), merge=True)


def test_an_adapter_that_cannot_be_merged_is_refused_in_a_sentence(tmp_path):
    settings = peft.LoraConfig(r=2, target_modules=["up_proj"], lora_bias=True)
    peft.get_peft_model(build("llama"), settings).save_pretrained(tmp_path / "lora")
    with pytest.raises(ModelError, match=r"cannot be merged: .*Leave model\.merge_adapter off"):
        with_adapter(build("llama"), str(tmp_path / "lora"), merge=True)
