"""What a fit says of halves of its data: as two dense fits have it, whatever the fit's way."""

import json
import re
from pathlib import Path

import pytest
import torch
import worker_layouts
from helpers.dense import dense_modules
from helpers.dense_families import dense_of
from helpers.families import tiny_model
from helpers.halves import (
    assert_same_halves,
    correlation,
    dense_change,
    dense_difference,
    numbers,
)
from helpers.killed_fits import content, fit
from helpers.networks import build, examples, shifted
from helpers.workshop import logged, rewrite_manifest
from matplotlib.figure import Figure

from ekfac_dist import estimate_factors, load_factors
from ekfac_dist.config import FactorsConfig
from ekfac_dist.curvature.long_sums import BESIDE, LongSums
from ekfac_dist.curvature.score_change import DAMPINGS
from ekfac_dist.errors import Preempted
from ekfac_dist.factors.layout import STATE
from ekfac_dist.fit import group
from ekfac_dist.fit.sizes import halves_bytes, lambda_elements, square_elements
from ekfac_dist.models.modules import LINEAR, TrackedModule
from ekfac_dist.report.halves import draw
from ekfac_dist.report.inspection import inspect_store, plot_spectra

EXACT = 1e-8
FIT = {"labels": "data", "accumulate": "float64", "batch_tokens": 24}


def assert_as_dense(factors, oracle, per_token=False):
    """That the manifest says what dense matrices of the two halves say."""
    said, changes = factors.manifest["halves"], {damping: [] for damping in DAMPINGS}
    for name in factors.modules:
        dense, fitted = oracle[name], factors.module(name)
        Q = torch.kron(fitted.basis_OO, fitted.basis_II)
        of_module = said["modules"][name]
        assert of_module["input"] == pytest.approx(dense_difference(dense.acts), rel=EXACT)
        assert of_module["output"] == pytest.approx(dense_difference(dense.grads), rel=EXACT)
        for damping in DAMPINGS:
            change = dense_change(dense, fitted.lambda_OI, Q, damping, per_token)
            changes[damping].append(change)
            if damping == 0.1:
                assert of_module["scores"] == pytest.approx(correlation([change]), rel=EXACT)
                # It can fail: with rows for columns it is another number.
                wrong = dense_change(dense, fitted.lambda_OI, Q.T, damping, per_token)
                assert abs(correlation([wrong]) - of_module["scores"]) > 1e-3
    for damping in DAMPINGS:
        half, twice = (correlation(changes[damping], scale) for scale in (1, 0.5))
        scores = said["scores"][str(damping)]
        assert scores == pytest.approx({"half": half, "twice": twice}, rel=EXACT)
        assert half < twice < 1


@pytest.mark.parametrize("refit", ["per_sequence", "per_token"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_halves_are_as_two_dense_fits_have_them(family, refit):
    model, data = build(family), examples(15, prompts=True)
    factors = estimate_factors(model, data, refit=refit, **FIT)
    oracle = dense_modules(model, [shifted(each) for each in data], list(factors.modules))
    assert_as_dense(factors, oracle, refit == "per_token")


def test_halves_of_single_positions_are_as_two_dense_fits_have_them():
    model, data = build("llama_bias"), examples(15, longest=2)
    factors = estimate_factors(model, data, **FIT)
    assert factors.manifest["data"]["num_positions"] == 15
    oracle = dense_modules(model, [shifted(each) for each in data], list(factors.modules))
    assert_as_dense(factors, oracle)


def test_halves_of_experts_are_those_of_the_positions_that_are_routed_to_them(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("ekfac_dist.curvature.score_change.LEAST_ROWS", 400)  # the oracle has all
    model, data = tiny_model("MixtralForCausalLM"), examples(15)
    factors = estimate_factors(model, data, **FIT)
    assert_as_dense(factors, dense_of(model, factors, data))


def test_a_difference_is_near_that_of_the_whole_matrices():
    model, data = build("llama"), examples(30)
    factors = estimate_factors(model, data, **FIT)
    oracle = dense_modules(model, [shifted(each) for each in data], list(factors.modules))
    for name, of_module in factors.manifest["halves"]["modules"].items():
        for side, vectors in (("input", oracle[name].acts), ("output", oracle[name].grads)):
            assert 0.5 < of_module[side] / dense_difference(vectors, exactly=True) < 2


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_tokens": 1},
        {"batch_tokens": 1000},
        {"partitions": 3},
        {"gradient_checkpointing": True},
    ],
)
@pytest.mark.parametrize("settings", [{}, {"blocks": 2, "labels": "sampled"}, {"refit": "none"}])
def test_neither_batches_nor_groups_nor_layers_computed_again_change_what_is_said(
    settings, changes
):
    model, data = build("llama_bias"), examples(prompts=True)
    settings = FIT | settings
    one, other = (estimate_factors(model, data, **of) for of in (settings, settings | changes))
    assert_same_halves(one, other)
    unknown = {key for key, value in numbers(one.manifest["halves"]).items() if value is None}
    is_kfac = settings.get("refit") == "none"
    assert {key for _, key in unknown} == ({"lambda", "scores"} if is_kfac else set())
    assert (one.manifest["halves"]["scores"] == {}) == is_kfac


def test_float32_sums_of_wide_modules_sample_rows_of_lambda(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("helpers.networks._rope.__defaults__", (24, 400, 1, 2))
    model, data = build("llama").float(), examples(40)
    said = numbers(estimate_factors(model, data, labels="data").manifest["halves"])
    monkeypatch.setattr("ekfac_dist.curvature.score_change.LEAST_ROWS", 400)
    exact = numbers(estimate_factors(model, data, labels="data").manifest["halves"])
    for key, value in exact.items():
        if key[1] in ("scores", "half", "twice"):
            assert 1 / said[key] ** 2 - 1 == pytest.approx(1 / value**2 - 1, rel=0.3), key


@pytest.mark.parametrize("number", [1, 7])
def test_a_half_without_sequences_is_said_not_to_be_measured(tmp_path: Path, number: int):
    data = examples(number)
    for each in data[1::2]:
        each["labels"] = torch.full_like(each["labels"], -100)
    estimate_factors(build("llama"), data, output=tmp_path / "store", **FIT)
    assert set(numbers(load_factors(tmp_path / "store").manifest["halves"]).values()) == {None}
    assert "not measured: a half of the data has no sequence" in inspect_store(tmp_path / "store")
    if number == 1:
        plot_spectra(tmp_path / "store", tmp_path / "spectra.png")


def test_more_sequences_are_asked_for_where_they_would_change_the_answer_alone(tmp_path: Path):
    asked = "more sequences would change the answer"
    few, equal = examples(9), [each for each in examples(9) for _ in range(2)]
    for name, data in (("few", few), ("equal", equal)):
        with logged() as lines:
            estimate_factors(build("llama"), data, output=tmp_path / name, **FIT)
        said = inspect_store(tmp_path / name)
        assert any(asked in line for line in lines) == (asked in said) == (name == "few")
    assert re.search(r"correlate with these at about 1\.0000 \(damping 0\.1\)", said)


def test_inspect_says_by_module_what_half_of_the_data_is_off(tmp_path: Path):
    estimate_factors(build("llama"), examples(15), output=tmp_path / "store", **FIT)
    halves = load_factors(tmp_path / "store").manifest["halves"]
    said = inspect_store(tmp_path / "store")
    for name, of_module in halves["modules"].items():
        (line,) = (each for each in said.splitlines() if each.startswith(f"{name} "))
        percent = [f"{100 * of_module[key]:.2g} %" for key in ("input", "output", "lambda")]
        assert re.search(r"\s+".join([*percent, f"{of_module['scores']:.4f}"]) + "$", line)
    least = min(halves["modules"], key=lambda name: halves["modules"][name]["scores"])
    assert f"least         {least} {halves['modules'][least]['scores']:.4f}, " in said


def test_the_plot_shows_every_module_that_is_known():
    halves = estimate_factors(build("llama"), examples(15), **FIT).manifest["halves"]
    first, *others = halves["modules"].values()
    first["input"] = None
    axis = Figure().subplots()
    draw(axis, halves)
    lines = {line.get_label(): line.get_ydata() for line in axis.get_lines()}
    assert list(lines["A"]) == [each["input"] for each in others]
    for label, key in (("S", "output"), ("Λ", "lambda")):
        assert list(lines[label]) == [each[key] for each in (first, *others)]
    scores = [1 - each["scores"] for each in (first, *others)]
    assert list(lines["1 − correlation of scores"]) == scores


def test_a_store_of_an_earlier_version_opens_and_says_that_nothing_was_measured(tmp_path: Path):
    model, store = build("llama"), tmp_path / "store"
    estimate_factors(model, examples(), output=store, **FIT)
    rewrite_manifest(store, lambda manifest: manifest.pop("halves"))
    load_factors(store, model=model)
    said = inspect_store(store)
    assert "halves        not measured: the factors were fitted by an earlier version" in said
    assert "½" not in said
    plot_spectra(store, tmp_path / "spectra.png")


@pytest.mark.parametrize(("stage", "steps"), [("covariance", 3), ("refit", 10)])
def test_states_of_an_earlier_version_go_on_and_what_they_lack_is_not_known(
    stage: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    worker_layouts.fit(tmp_path / "whole", "dense", 1)
    whole, state = content(tmp_path / "whole"), LongSums.state
    with monkeypatch.context() as earlier, worker_layouts.stopped_after(steps):
        earlier.setattr(
            LongSums,
            "state",
            lambda sums: {k: v for k, v in state(sums).items() if not k.startswith(BESIDE)},
        )
        with pytest.raises(Preempted):
            worker_layouts.fit(tmp_path / "stopped", "dense", 1)
    assert any((tmp_path / "stopped" / STATE).glob(f"{stage}-1/*/part.json"))
    worker_layouts.fit(tmp_path / "stopped", "dense", 1)
    found = content(tmp_path / "stopped")
    halves = json.loads(found.pop("manifest.json"))["halves"]
    whole.pop("manifest.json")
    assert found == whole  # the factors' bytes
    lacking = {"refit": ["lambda", "scores"]}.get(stage, ["input", "lambda", "output", "scores"])
    for of_module in halves["modules"].values():
        assert sorted(key for key, value in of_module.items() if value is None) == lacking


def test_states_that_are_taken_up_hold_the_sums_over_half_of_the_sequences(tmp_path: Path):
    worker_layouts.fit(tmp_path / "whole", "dense", 1)
    for steps in (3, 10):
        with worker_layouts.stopped_after(steps), pytest.raises(Preempted):
            worker_layouts.fit(tmp_path / "stopped", "dense", 1)
    worker_layouts.fit(tmp_path / "stopped", "dense", 1)
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


def test_factors_are_the_same_bytes_with_and_without_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fit(tmp_path / "with")
    for sums in ("CovarianceSums", "LambdaSums"):
        _without_halves(monkeypatch, sums)
    fit(tmp_path / "without")
    one, other = (content(tmp_path / name) for name in ("with", "without"))
    assert one.pop("manifest.json") != other.pop("manifest.json")
    assert one == other


def _without_halves(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Makes a fit's sums what they were before halves were known."""
    made = getattr(group, name)

    class Without(made):
        def __init__(self, *args, with_halves=False, **settings):
            super().__init__(*args, **settings)

        def relative_differences(self):
            return {}

        def changes(self, *of):
            return {}

    monkeypatch.setattr(group, name, Without)


def test_less_than_two_percent_more_is_held():
    def module(name, inputs, outputs):
        return TrackedModule(name, LINEAR, inputs, outputs, False, f"{name}.in", f"{name}.out")

    for hidden, mlp in ((576, 1536), (768, 3072), (4096, 14336)):
        layer = [module("up", hidden, mlp), module("down", mlp, hidden)]
        factors = FactorsConfig()
        more, squares = halves_bytes(layer, factors), 4 * sum(square_elements(layer, factors))
        assert more["covariance"] < 0.02 * squares
        assert more["refit"] < 0.02 * (squares + 4 * sum(lambda_elements(layer)))
