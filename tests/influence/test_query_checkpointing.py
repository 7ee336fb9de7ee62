"""Queries with gradient checkpointing: the scores of passes that hold all activations."""

import pytest
import torch
from helpers.families import tiny_model
from helpers.networks import CONFIGS, build, examples

from ekfac_dist import estimate_factors, influence_scores
from ekfac_dist.errors import ConfigError
from ekfac_dist.models.capture.checkpointing import LayerCheckpointing
from ekfac_dist.passes import step_memory

SETTINGS = {"batch_tokens": 16, "per_token": "all", "self_influence": True, "normalize": "cosine"}


def scores_of(model, factors, **settings):
    return influence_scores(
        model, factors, examples(3, prompts=True), examples(9, prompts=True), **SETTINGS, **settings
    )


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Counts the steps whose layers are computed again."""
    steps, active = [], LayerCheckpointing.active

    def counted(self):
        steps.append("step")
        return active(self)

    monkeypatch.setattr(LayerCheckpointing, "active", counted)
    return steps


@pytest.mark.parametrize("family", ["llama", "gpt2", "MixtralForCausalLM"])
def test_scores_are_the_same_with_layers_computed_again(family: str, repeated: list[str]):
    model = build(family) if family in CONFIGS else tiny_model(family)
    factors = estimate_factors(model, examples(9, prompts=True), accumulate="float64")
    whole = scores_of(model, factors, gradient_checkpointing=False)
    assert not repeated
    again = scores_of(model, factors, gradient_checkpointing=True)
    assert repeated
    for field in ("scores", "token_scores", "self_influence", "query_norms"):
        expected = getattr(whole, field)
        assert torch.allclose(getattr(again, field), expected, rtol=1e-10, atol=1e-12)


def test_activations_that_do_not_fit_are_not_held(
    repeated: list[str], monkeypatch: pytest.MonkeyPatch
):
    model = build("llama")
    factors = estimate_factors(model, examples(9, prompts=True), accumulate="float64")
    monkeypatch.setattr(step_memory, "available_bytes", lambda device: 10**9)
    whole = scores_of(model, factors)
    assert not repeated
    monkeypatch.setattr(step_memory, "available_bytes", lambda device: 10_000)
    again = scores_of(model, factors)
    assert repeated
    assert torch.allclose(again.scores, whole.scores, rtol=1e-10, atol=1e-12)


def test_another_value_is_refused():
    model = build("llama")
    factors = estimate_factors(model, examples(2), accumulate="float64")
    with pytest.raises(ConfigError, match="gradient_checkpointing is 'on'; give true, false or a"):
        scores_of(model, factors, gradient_checkpointing="on")
