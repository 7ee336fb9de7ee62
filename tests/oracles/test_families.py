"""Families that nobody listed: every MLP of each against dense autograd, in float64 (oracle 1)."""

from pathlib import Path

import pytest
import torch
from helpers.dense import dense_modules, relative
from helpers.families import PLAIN, WITH_EXPERTS, config_classes, tiny_model
from helpers.networks import examples, shifted
from safetensors import safe_open

from ekfac_dist import estimate_factors
from ekfac_dist.errors import ModelError
from ekfac_dist.models.capture.prepare import prepared
from ekfac_dist.models.find.discovery import discover
from ekfac_dist.models.modules import layer_name

FIT = {"labels": "data", "accumulate": "float64"}
EXACT = 1e-10  # with each sequence alone, as the oracle has it
# Norms, rotations or logits may be computed in float32 whatever the model's dtype, so that forwards
# of different shape agree less well.
IN_BATCHES = 1e-6
# What is no matrix of a linear map: scales of an activation, or of the mixing of positions.
PARTLY = {"ApertusForCausalLM", "RwkvForCausalLM"}


@pytest.mark.parametrize("family", PLAIN)
def test_every_mlp_of_a_family_is_as_dense_autograd_has_it(family, tmp_path):
    factors = compare_with_dense(tiny_model(family), tmp_path)
    coverage = factors.manifest["coverage"]
    if family not in PARTLY:
        assert coverage["tracked_mlp_parameters"] == coverage["mlp_parameters"]
        assert not coverage["skipped"]


# What a configuration may ask for: logits that are capped or scaled, windows of attention that are
# shorter than the sequences, attention beside the MLP.
VARIANTS = {
    "logits capped": (
        "Gemma2ForCausalLM",
        {"final_logit_softcapping": 1.0, "attn_logit_softcapping": 0.5},
    ),
    "logits divided": ("GraniteForCausalLM", {"logits_scaling": 0.3}),
    "logits multiplied": ("CohereForCausalLM", {"logit_scale": 3.0}),
    "a sliding window": ("MistralForCausalLM", {"sliding_window": 3}),
    "a sliding window in some layers": (
        "Gemma3ForCausalLM",
        {"sliding_window": 2, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "attention beside the MLP": ("StableLmForCausalLM", {"use_parallel_residual": True}),
    "attention before the MLP": ("GPTNeoXForCausalLM", {"use_parallel_residual": False}),
    "an MLP in chunks": ("BertLMHeadModel", {"chunk_size_feed_forward": 3}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_of_a_family_is_as_dense_autograd_has_it(variant, tmp_path):
    family, changes = VARIANTS[variant]
    model = tiny_model(family, **changes)
    plain = tiny_model(family)
    ids = torch.arange(12)[None] % 9
    in_chunks = "chunks" in variant
    changed = relative(model(input_ids=ids).logits, plain(input_ids=ids).logits) > 1e-3
    assert changed is not in_chunks
    factors = compare_with_dense(model, tmp_path, oracle=plain if in_chunks else model)
    assert factors.manifest["coverage"]["skipped"] == {}


@pytest.mark.parametrize("biased", [("up_proj",), ("down_proj",), ("gate_proj", "down_proj")])
def test_some_projections_have_a_bias_and_some_have_none(biased, tmp_path):
    model = tiny_model("LlamaForCausalLM")
    for layer in model.model.layers:
        for name in biased:
            bias = torch.randn(getattr(layer.mlp, name).out_features, dtype=torch.float64)
            getattr(layer.mlp, name).bias = torch.nn.Parameter(bias)
    factors = compare_with_dense(model, tmp_path)
    gate, up = (factors.modules[f"model.layers.0.mlp.{name}_proj"] for name in ("gate", "up"))
    assert (gate.input == up.input) is (gate.bias == up.bias)


def compare_with_dense(model, tmp_path, oracle=None):
    """Fits a model's factors; A, S and Λ of each module have to be those of dense autograd."""
    data = examples(8, prompts=True)
    factors = estimate_factors(model, data, output=tmp_path / "store", batch_tokens=1, **FIT)
    sequences = [shifted(example) for example in data]
    oracle = dense_modules(oracle or model, sequences, list(factors.modules))
    for name, module in factors.modules.items():
        dense = oracle[name]
        for factor, expected in ((module.input, dense.A), (module.output, dense.S)):
            path = tmp_path / "store" / "covariance" / f"{factor}.safetensors"
            with safe_open(path, framework="pt") as file:
                count = int(file.metadata()["count"])
                assert count == dense.M
                assert relative(file.get_tensor("sum") / count, expected) < EXACT
        fitted = factors.module(name)
        Q = torch.kron(fitted.basis_OO, fitted.basis_II)
        diagonal = torch.diag(Q.T @ dense.F @ Q)
        assert relative(fitted.lambda_OI.flatten(), diagonal) < EXACT
    in_batches = estimate_factors(model, data, batch_tokens=24, **FIT)
    for name, dense in oracle.items():
        trace = in_batches.module(name).lambda_OI.sum()
        assert relative(trace, dense.F.trace()) < IN_BATCHES
    return factors


def test_a_family_that_computes_positions_first_is_refused():
    with pytest.raises(ModelError, match=r"layer_1 does not compute sequence by sequence.*\[5, 2"):
        estimate_factors(tiny_model("XLNetLMHeadModel"), examples(4), **FIT)


def test_the_families_are_at_least_25_and_are_there():
    families = {*PLAIN, *WITH_EXPERTS}
    assert len(families) >= 25
    assert families <= set(config_classes())


def families_table():
    """The table of docs/models.md: what is tracked of each family's tiny model, and what is not."""
    rows = ["| model | modules of a layer | of the MLP's parameters |", "|---|---|---|"]
    for family in sorted([*PLAIN, *WITH_EXPERTS], key=str.lower):
        model = tiny_model(family)
        with prepared(model):
            found = discover(model, None, torch.device("cpu"))
        coverage = found.coverage
        layers = sorted({layer_name(module.name) for module in found.modules})
        last = [m for m in found.modules if layer_name(m.name) == layers[-1]]
        names = dict.fromkeys(
            f"{m.name.rpartition('.')[2]} of each expert"
            if m.kind == "expert"
            else m.name.removeprefix(f"{layers[-1]}.")
            for m in last
        )
        share = f"{coverage.tracked_mlp_parameters / coverage.mlp_parameters:.1%}"
        left_out = dict.fromkeys(name.rpartition(".")[2] for name in coverage.skipped)
        share += f", without {', '.join(left_out)}" if left_out else ""
        rows.append(f"| {family} | {', '.join(names)} | {share} |")
    return "\n".join(rows)


def test_the_page_of_models_has_the_table_of_families():
    """Made anew by: PYTHONPATH=tests python tests/oracles/test_families.py"""
    page = Path(__file__).parents[2] / "docs" / "models.md"
    assert families_table() in page.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(families_table())
