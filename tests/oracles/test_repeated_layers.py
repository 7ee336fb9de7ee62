"""Layers that are computed again in the backward: every family's rows, and factors of fits."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.dense import dense_E, dense_modules, relative
from helpers.dense_families import dense_of
from helpers.families import PLAIN, WITH_EXPERTS, tiny_model
from helpers.networks import build, examples, shifted
from helpers.recorded_steps import assert_seen_alike
from helpers.task_models import bart, bert, masked_examples, t5, translated_examples
from test_experts import PICKS, RoutedList

from ekfac_dist import MaskedLM, Seq2SeqLM, estimate_factors
from ekfac_dist.data.sequences import collate
from ekfac_dist.data.tokenized_examples import from_examples
from ekfac_dist.errors import NonFiniteError
from ekfac_dist.models.capture.hooks import Capture
from ekfac_dist.models.capture.prepare import prepared
from ekfac_dist.models.find.discovery import discover
from ekfac_dist.passes.context import PassContext
from ekfac_dist.passes.step_memory import measured_step
from ekfac_dist.runtime.processes import World

FIT = {"labels": "data", "accumulate": "float64", "batch_tokens": 24}
AGAIN = FIT | {"gradient_checkpointing": True}
EXACT = 1e-10
WRITES_INTO_A_CACHE = {"XLMWithLMHeadModel"}  # refused, see test_checkpointing


@pytest.mark.parametrize("family", [*PLAIN, *WITH_EXPERTS])
def test_every_family_is_seen_as_without(family):
    if family in WRITES_INTO_A_CACHE:
        return
    model = tiny_model(family)
    batch = collate(list(from_examples(examples(5, prompts=True))))
    with prepared(model):
        modules = discover(model, None, torch.device("cpu")).modules
        assert_seen_alike(model, modules, batch)


@pytest.fixture
def repeats(monkeypatch):
    """Whether each step computes its layers again."""
    steps = []
    plain = Capture.run

    def run(self, batch, rule):
        steps.append(self._checkpointing is not None)
        return plain(self, batch, rule)

    monkeypatch.setattr(Capture, "run", run)
    return steps


def same(again, plain):
    assert list(again.modules) == list(plain.modules)
    for name in plain.modules:
        assert relative(again.module(name).lambda_OI, plain.module(name).lambda_OI) < 1e-12
        assert relative(dense_E(again, name), dense_E(plain, name)) < 1e-12


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_factors_are_as_dense_autograd_has_them(family, repeats):
    model, data = build(family), examples(prompts=True)
    factors = estimate_factors(model, data, **AGAIN)
    assert sum(repeats) > 2
    oracle = dense_modules(model, [shifted(e) for e in data], list(factors.modules))
    for name, dense in oracle.items():
        assert relative(dense_E(factors, name), dense.E()) < EXACT


def test_factors_of_experts_are_as_dense_autograd_has_them(repeats):
    model, data = tiny_model("MixtralForCausalLM"), examples(prompts=True)
    factors = estimate_factors(model, data, **AGAIN)
    assert sum(repeats) > 2
    dense = dense_of(model, factors, data)
    for name in factors.modules:
        fitted = factors.module(name)
        Q = torch.kron(fitted.basis_OO, fitted.basis_II)
        diagonal = torch.diag(Q.T @ dense[name].F @ Q)
        assert relative(fitted.lambda_OI.flatten(), diagonal) < EXACT


@pytest.mark.parametrize(
    ("made", "data", "settings"),
    [
        (partial(build, "llama"), examples(9), {"labels": "sampled", "refit": "per_token"}),
        (partial(build, "opt"), examples(7), {"partitions": 2, "blocks": 2}),
        (bert, masked_examples(9), {"task": MaskedLM()}),
        (t5, translated_examples(9), {"task": Seq2SeqLM()}),
        (bart, translated_examples(9), {"task": Seq2SeqLM()}),
    ],
)
def test_factors_are_as_without(made, data, settings, repeats):
    again = estimate_factors(made(), data, **(AGAIN | settings))
    assert sum(repeats) > 2
    same(again, estimate_factors(made(), data, **(FIT | settings)))


@pytest.mark.parametrize(
    "pick",
    [
        "tokens[None, index]",
        *(pytest.param(pick, marks=pytest.mark.slow) for pick in PICKS if "None" not in pick),
    ],
)
def test_experts_in_lists_are_as_without(pick, repeats):
    model, data = tiny_model("MixtralForCausalLM"), examples(8)
    for layer in model.model.layers:
        layer.mlp.experts = RoutedList(layer.mlp.experts, PICKS[pick])
    again = estimate_factors(model, data, **AGAIN)
    assert sum(repeats) > 2
    same(again, estimate_factors(model, data, **FIT))


def test_a_weight_that_is_nan_is_named_where_it_is_met_first(repeats):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"input of module model\.layers\.0\.mlp\.down_proj"):
        estimate_factors(model, examples(4), **AGAIN)
    assert all(repeats[-2:])


def test_a_measured_step_keeps_less():
    model = tiny_model("LlamaForCausalLM", num_hidden_layers=6)
    sequences, world = from_examples(examples(9)), World.start()
    context = PassContext(model, sequences, [[0, 1], [2]], world, torch.float32, False)
    with prepared(model):
        modules = discover(model, None, torch.device("cpu")).modules
        whole = measured_step(context, modules)
        again = measured_step(replace(context, checkpoints=True), modules)
    assert 0 < again.activation_bytes < 0.5 * whole.activation_bytes
    assert (again.logit_bytes, again.itemsize) == (whole.logit_bytes, whole.itemsize)
