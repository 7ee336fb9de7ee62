"""NaN or infinity anywhere is an error that names where it first appeared, never a factor."""

import pytest
import torch
from helpers.networks import build, examples

from ekfac_dist import estimate_factors
from ekfac_dist.errors import NonFiniteError
from ekfac_dist.fit import group as fit


@pytest.mark.parametrize("rule", ["data", "sampled"])
def test_a_weight_that_is_nan_is_met_at_the_next_module(rule):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    sentence = (
        r"input of module model\.layers\.0\.mlp\.down_proj, in the covariance pass.*sequence \d+"
    )
    with pytest.raises(NonFiniteError, match=sentence):
        estimate_factors(model, examples(4), labels=rule)


def test_a_gradient_alone_is_named():
    model = build("llama")

    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g):
            return g * torch.inf

    mlp = model.model.layers[1].mlp
    plain = mlp.forward
    mlp.forward = lambda x: Explode.apply(plain(x))
    with pytest.raises(
        NonFiniteError, match=r"output-gradient of module model\.layers\.1\.mlp\.down"
    ):
        estimate_factors(model, examples(4))


@pytest.mark.parametrize("rule", ["data", "sampled"])
def test_logits_alone_are_named(rule):
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.inf
    with pytest.raises(NonFiniteError, match=r"logits, in the covariance pass"):
        estimate_factors(model, examples(4), labels=rule)


def test_only_the_sequence_that_is_not_finite_is_named():
    model, data = build("llama"), examples(6)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = torch.inf
    for number, example in enumerate(data):
        ids = example["input_ids"]
        ids[ids == 0] = 1
        if number == 4:
            ids[0] = 0
    with pytest.raises(NonFiniteError, match="at sequence 4 of the data"):
        estimate_factors(model, data)


def test_a_sum_that_overflows_though_each_part_is_finite_says_so():
    model = build("llama").float()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.fill_(4e18)
        model.model.layers[1].mlp.gate_proj.weight.fill_(0)
        model.model.layers[1].mlp.down_proj.weight.fill_(0)
    data = [{"input_ids": torch.arange(1, 12)} for _ in range(4)]
    with pytest.raises(NonFiniteError, match=r"accumulate: float64"):
        estimate_factors(model, data)


def test_the_second_pass_is_named_too(monkeypatch):
    model, passes = build("llama"), []
    mlp = model.model.layers[1].mlp
    forward = mlp.forward

    def later(x):
        return forward(x) * (float("nan") if passes else 1.0)

    mlp.forward = later
    plain_pass = fit.run_pass

    def remembering(name, *rest, **options):
        result = plain_pass(name, *rest, **options)
        passes.append(name)
        return result

    monkeypatch.setattr(fit, "run_pass", remembering)
    with pytest.raises(NonFiniteError, match="in the refit pass"):
        estimate_factors(model, examples(4))
