"""Quantised weights: capture never reads them, so factors are of what the modules compute."""

import importlib.util
import json

import accelerate
import peft
import pytest
import torch
from helpers.dense import relative
from helpers.networks import build, examples
from helpers.workshop import run_cli, save_tiny, texts, tiny_llama_config, write_jsonl
from torch import nn
from transformers import AutoModelForCausalLM

from ekfac_dist import estimate_factors, influence_scores, load_factors
from ekfac_dist.config import ModelConfig
from ekfac_dist.errors import ModelError, StoreError
from ekfac_dist.models.load.pretrained import load_model

FIT = {"labels": "data", "accumulate": "float64", "batch_tokens": 24}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    config = tiny_llama_config(hidden_size=32, intermediate_size=64)  # of bitsandbytes' blocks
    return save_tiny(tmp_path_factory.mktemp("quantised") / "model", config)


def dequantised(saved, quantised):
    """A plain model with the weights that a quantised one stands for."""
    import bitsandbytes as bnb

    plain = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, module in quantised.named_modules():
            weight = getattr(plain.get_submodule(name), "weight", None)
            if isinstance(module, bnb.nn.Linear8bitLt):
                state = module.weight.CB, module.weight.SCB
                if state[0] is None:
                    state = module.state.CB, module.state.SCB
                weight.copy_(state[0].float() * state[1][:, None] / 127)
            elif isinstance(module, bnb.nn.Linear4bit):
                weight.copy_(
                    bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                )
    return plain


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_an_adapter_on_quantised_weights_leaves_them_as_they_are(saved, tmp_path, quantization):
    config, data = ModelConfig(name=str(saved), quantization=quantization), examples(5)
    settings = peft.LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load_model(config, CPU), settings).eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    factors = estimate_factors(model, data, **FIT)
    options = {"top_k": 1, "damping": 1.0, "relative": False}  # B is 0, and so is the Λ of A
    assert torch.isfinite(influence_scores(model, factors, data[:1], data, **options).scores).all()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_scales_of_quantised_weights_are_in_the_fingerprint(saved, tmp_path):
    config = ModelConfig(name=str(saved), quantization="8bit")
    model = load_model(config, CPU)
    estimate_factors(model, examples(3), output=tmp_path / "factors")
    state = model.model.layers[0].mlp.up_proj.state
    state.SCB = state.SCB * 2
    with pytest.raises(StoreError, match="its weights differ"):
        load_factors(tmp_path / "factors", model=model)


@pytest.mark.parametrize(("quantization", "within"), [("4bit", 1e-5), ("8bit", 0.03)])
def test_factors_are_those_of_the_dequantised_weights(saved, tmp_path, quantization, within):
    """8-bit products round their inputs too, so they agree less well."""
    config, data = ModelConfig(name=str(saved), quantization=quantization), examples(8)
    model = load_model(config, CPU)
    plain = dequantised(saved, load_model(config, CPU))
    found = estimate_factors(model, data, output=tmp_path / "factors", **FIT)
    expected = estimate_factors(plain, data, **FIT)
    coverage = found.manifest["coverage"]
    assert coverage == expected.manifest["coverage"]
    assert coverage["tracked_parameters"] == coverage["mlp_parameters"] == 2 * 3 * 32 * 64
    for name in expected.modules:
        one, other = (f.module(name).lambda_OI.sum() for f in (found, expected))
        assert relative(one, other) < within
        probe = {name: torch.randn(found.module(name).lambda_OI.shape, dtype=torch.float64)}
        assert relative(found.apply(probe)[name], expected.apply(probe)[name]) < 5 * within
    says = r"8 quantised weights outside the tracked modules .*k_proj\.weight first\) were not comp"
    with pytest.warns(UserWarning, match=says):
        load_factors(tmp_path / "factors", model=load_model(config, CPU))
    with pytest.raises(StoreError, match="its weights differ"):
        load_factors(tmp_path / "factors", model=plain)


@pytest.mark.slow
def test_the_command_fits_and_queries_a_quantised_model(saved, tmp_path):
    data = write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in texts(12)])
    store, scores = tmp_path / "store", tmp_path / "scores"
    source = ["--model.name", saved, "--data.source", data, "--output", store]
    done = run_cli(["estimate", *source, "--model.quantization", "8bit"])
    assert done.returncode == 0, done.stderr
    assert "MatMul8bitLt" not in done.stderr
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"text": "The worker reads."}])
    done = run_cli(["query", "--factors", store, "--queries", queries, "--output", scores])
    assert done.returncode == 0, done.stderr
    manifest = json.loads((store / "manifest.json").read_text())
    assert manifest["config"]["model"]["quantization"] == "8bit"


def test_without_the_library_the_sentence_says_what_to_install(saved, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs the package bitsandbytes.*quantized"):
        load_model(ModelConfig(name=str(saved), quantization="4bit"), CPU)


class Packed(nn.Module):
    """A linear map as quantisation libraries write them: no `nn.Linear`, its weight in buffers."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("qweight", torch.round(linear.weight.detach() / scale).to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    @property
    def dense(self):
        return self.qweight.double() * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dense, self.bias)


@pytest.mark.parametrize("family", ["llama", "llama_bias"])
def test_a_weight_that_cannot_be_read_is_no_obstacle(family, tmp_path):
    packed, plain, data = build(family), build(family), examples(8)
    for layer, other in zip(packed.model.layers, plain.model.layers, strict=True):
        for name in ("gate_proj", "up_proj", "down_proj"):
            module = Packed(getattr(layer.mlp, name))
            setattr(layer.mlp, name, module)
            with torch.no_grad():
                getattr(other.mlp, name).weight.copy_(module.dense)
    found = estimate_factors(packed, data, output=tmp_path / "factors", **FIT)
    expected = estimate_factors(plain, data, **FIT)
    assert found.manifest["coverage"] == expected.manifest["coverage"]
    assert found.manifest["modules"] == expected.manifest["modules"]
    for name in expected.modules:
        assert relative(found.module(name).lambda_OI, expected.module(name).lambda_OI) < 1e-9
    load_factors(tmp_path / "factors", model=packed)
    packed.model.layers[1].mlp.down_proj.qweight[0, 0] += 1
    with pytest.raises(StoreError, match="its weights differ"):
        load_factors(tmp_path / "factors", model=packed)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_weights_that_are_kept_elsewhere_until_they_are_needed_are_no_obstacle(where, tmp_path):
    data, queries = examples(6), examples(2, seed=3)
    plain, offloaded = build("llama"), build("llama")
    if where == "cpu":
        accelerate.cpu_offload(offloaded, torch.device("cpu"))
    else:
        accelerate.disk_offload(offloaded, str(tmp_path / "weights"), torch.device("cpu"))
    assert offloaded.model.layers[0].mlp.up_proj.weight.is_meta
    found = estimate_factors(offloaded, data, output=tmp_path / "factors", **FIT)
    expected = estimate_factors(plain, data, **FIT)
    assert found.manifest["model"]["fingerprint"] == expected.manifest["model"]["fingerprint"]
    for name in expected.modules:
        assert torch.equal(found.module(name).lambda_OI, expected.module(name).lambda_OI)
    answers = [
        influence_scores(model, load_factors(tmp_path / "factors", model=model), queries, data)
        for model in (offloaded, plain)
    ]
    assert torch.equal(answers[0].scores, answers[1].scores)
    assert offloaded.model.layers[0].mlp.up_proj.weight.is_meta
