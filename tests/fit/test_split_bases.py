"""Fits and scores of bfloat16 models with split bases are those with whole ones."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.dense import dense_E, relative
from helpers.networks import build, examples

from ekfac_dist import estimate_factors, influence_scores
from ekfac_dist.curvature import split_matrices
from ekfac_dist.fit import refit
from ekfac_dist.fit.refit import products_lines
from ekfac_dist.influence import device_factors, held
from ekfac_dist.models.modules import LINEAR, TrackedModule, factor_sizes

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def num_split(monkeypatch):
    """How many products were made with split matrices, since `begin` was called."""
    made = []

    def wide(left, right):
        made.append(1)
        return (left.double() @ right.double()).float()

    monkeypatch.setattr(split_matrices, "_wide", wide)

    def begin():
        monkeypatch.setattr(split_matrices, "_pays_on", lambda device: True)
        return made

    return begin


def bfloat16(family):
    return build(family).to(torch.bfloat16)


@pytest.mark.parametrize("family", ["llama", "llama_bias", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"blocks": 2}, {"refit": "per_token"}])
def test_factors_are_the_same(num_split, family, settings):
    settings = {"labels": "data", "batch_tokens": 24, **settings}
    expected = estimate_factors(bfloat16(family), examples(12), **settings)
    made = num_split()
    factors = estimate_factors(bfloat16(family), examples(12), **settings)
    assert made
    for name, module in expected.modules.items():
        lambda_OI = expected.module(name).lambda_OI
        assert lambda_OI.shape == (module.num_outputs, module.input_size)
        assert relative(factors.module(name).lambda_OI, lambda_OI) < 1e-5
        assert relative(dense_E(factors, name), dense_E(expected, name)) < 1e-5


@pytest.mark.parametrize("before", [(True, False), (False, True), (False, False)])
def test_sequences_gradients_are_rotated_by_the_whole_bases(num_split, monkeypatch, before):
    for choice, value in zip(("rotates_inputs", "rotates_output_gradients"), before, strict=True):
        monkeypatch.setattr(refit, choice, lambda *_, value=value: value)
    fit = partial(estimate_factors, bfloat16("llama_bias"), examples(12), labels="data")
    expected = fit()
    made = num_split()
    factors = fit()
    assert bool(made) == any(before)
    for name in expected.modules:
        assert relative(factors.module(name).lambda_OI, expected.module(name).lambda_OI) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_that_bfloat16_does_not_hold_are_not_split(num_split, dtype):
    made = num_split()
    estimate_factors(build("llama").to(dtype), examples(5), labels="data")
    estimate_factors(bfloat16("llama"), examples(5), labels="data", accumulate="float64")
    assert not made


@pytest.mark.parametrize("options", [{"normalize": "cosine", "top_k": 3}, {"rank": 3}])
def test_scores_are_the_same(num_split, monkeypatch, options):
    train, queries = examples(12, seed=1, prompts=True), examples(4, seed=2, prompts=True)
    factors = estimate_factors(build("llama_bias"), train, labels="data")
    options = {"batch_tokens": 24, **options}
    expected = influence_scores(bfloat16("llama_bias"), factors, queries, train, **options)
    made = num_split()
    shown = set()

    class Splitting(device_factors.DeviceFactors):
        def rotated_input(self, module, acts_Mi):
            shown.add(acts_Mi.dtype)
            return super().rotated_input(module, acts_Mi)

    monkeypatch.setattr(held, "DeviceFactors", partial(Splitting, splits=True))
    scores = influence_scores(bfloat16("llama_bias"), factors, queries, train, **options)
    assert made
    assert shown == {torch.bfloat16}  # queries and training sequences
    assert relative(scores.scores, expected.scores) < 1e-5


def test_bases_are_not_split_in_a_refit_that_has_no_room_for_it(num_split, monkeypatch):
    asked = []

    def room(context, modules, step_tokens, held, wanted, places):
        asked.append((modules, held, wanted))
        return wanted - 1

    made = num_split()
    monkeypatch.setattr(refit, "room_beside_steps", room)
    estimate_factors(bfloat16("llama"), examples(5), labels="data")
    assert not made
    ((modules, held, wanted),) = asked
    sizes = factor_sizes(modules).values()
    assert wanted == 2 * sum(size**2 for size in sizes) + 12 * max(sizes) ** 2
    lambdas = [module.num_outputs * module.input_size for module in modules]
    assert held == 4 * (sum(lambdas) + 3 * max(lambdas))


@pytest.mark.parametrize(
    ("in_eigenbasis", "dtype", "each"),
    [(True, torch.bfloat16, 6), (False, torch.bfloat16, 4), (True, torch.float32, 4)],
)
def test_their_memory_is_planned_in_queries(num_split, monkeypatch, in_eigenbasis, dtype, each):
    num_split()
    module = TrackedModule("m", LINEAR, 100, 50, False, "m.input", "m.output")
    context = SimpleNamespace(
        world=SimpleNamespace(device=GPU),
        dtype=torch.float32,
        model_dtype=dtype,
        own_modules=[module],
        modules=[module],
        factors=SimpleNamespace(num_blocks=1),
        in_eigenbasis=in_eigenbasis,
        over=lambda scored: None,
        batch_tokens=1,
        shard=1,
    )
    monkeypatch.setattr(held, "_held_gradients", lambda *_: 0)
    monkeypatch.setattr(held, "room_beside_steps", lambda *args: args[4])
    monkeypatch.setattr(held, "DeviceFactors", lambda *args, splits: (args[3], splits))
    wanted, is_split = held.factors_on_device(context, None, 1, None)
    assert wanted == each * (100**2 + 50**2) + 4 * 100 * 50
    assert is_split == (each == 6)


def test_a_gpu_tells_how_it_makes_the_refits_products(monkeypatch):
    assert products_lines(CPU, torch.float32, is_split=False) == []
    monkeypatch.setattr(refit, "squares_kernel", lambda device: "Triton is not installed")
    assert products_lines(GPU, torch.float64, is_split=False) == []
    assert products_lines(GPU, torch.float32, is_split=True) == [
        "refit rotations by three bfloat16 products each",
        "refit squares without a kernel: Triton is not installed",
    ]
    kernel = SimpleNamespace(description="by one kernel")
    monkeypatch.setattr(refit, "squares_kernel", lambda device: kernel)
    assert products_lines(GPU, torch.float32, is_split=False) == [
        "refit rotations by float32 products",
        "refit squares by one kernel",
    ]
