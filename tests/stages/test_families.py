"""Families that nobody listed: every MLP of each against dense autograd, in float64 (oracle 1)."""

import pytest
import torch
from dense import dense_modules, relative
from families import config_classes, tiny_model
from networks import examples, shifted
from safetensors import safe_open

from ekfac_dist import estimate_factors
from ekfac_dist.errors import ModelError

FIT = {"labels": "data", "accumulate": "float64"}
EXACT = 1e-10  # with each sequence alone, as the oracle has it
# Norms, rotations or logits may be computed in float32 whatever the model's dtype, so that forwards
# of different shape agree less well.
IN_BATCHES = 1e-6
FAMILIES = [
    *("ApertusForCausalLM", "ArceeForCausalLM", "BartForCausalLM", "BertLMHeadModel"),
    *("BioGptForCausalLM", "BitNetForCausalLM", "BloomForCausalLM", "CTRLLMHeadModel"),
    *("CohereForCausalLM", "DiffLlamaForCausalLM", "Exaone4ForCausalLM", "FalconForCausalLM"),
    *("GPTBigCodeForCausalLM", "GPTJForCausalLM", "GPTNeoForCausalLM", "Gemma2ForCausalLM"),
    *("Glm4ForCausalLM", "GraniteForCausalLM", "ModernBertDecoderForCausalLM", "MptForCausalLM"),
    *("NemotronForCausalLM", "OlmoHybridForCausalLM", "OpenAIGPTLMHeadModel"),
    *("PersimmonForCausalLM", "PhiForCausalLM", "RwkvForCausalLM", "StableLmForCausalLM"),
    *("Starcoder2ForCausalLM", "VaultGemmaForCausalLM", "WhisperForCausalLM"),
    "XLMWithLMHeadModel",
]
# What is no matrix of a linear map: scales of an activation, or of the mixing of positions.
PARTLY = {"ApertusForCausalLM", "RwkvForCausalLM"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mlp_of_a_family_is_as_dense_autograd_has_it(family, tmp_path):
    model, data = tiny_model(family), examples(8, prompts=True)
    factors = estimate_factors(model, data, output=tmp_path / "store", batch_tokens=1, **FIT)
    coverage = factors.manifest["coverage"]
    if family not in PARTLY:
        assert coverage["tracked_mlp_parameters"] == coverage["mlp_parameters"]
        assert not coverage["skipped"]
    oracle = dense_modules(model, [shifted(e) for e in data], list(factors.modules))
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


def test_a_family_that_computes_positions_first_is_refused():
    with pytest.raises(ModelError, match=r"layer_1 does not compute sequence by sequence.*\[5, 2"):
        estimate_factors(tiny_model("XLNetLMHeadModel"), examples(4), **FIT)


def test_the_families_are_at_least_25_and_are_there():
    assert len(set(FAMILIES)) >= 25
    assert set(FAMILIES) <= set(config_classes())
