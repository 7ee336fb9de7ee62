"""What a fit must satisfy exactly, against dense autograd in float64."""

import numpy as np
import pytest
import torch
from helpers.dense import dense_E, dense_modules, drawn_targets, relative
from helpers.networks import CONFIGS, KINDS, build, examples, shifted

from ekfac_dist import estimate_factors
from ekfac_dist.models.capture.labels import REFIT_PASS, uniforms

EXACT = 1e-10
FIT = {"labels": "data", "accumulate": "float64", "batch_tokens": 24}


def fit_and_oracle(family, data=None, **settings):
    model, data = build(family), data if data is not None else examples(prompts=True)
    factors = estimate_factors(model, data, **(FIT | settings))
    oracle = dense_modules(model, [shifted(e) for e in data], list(factors.modules))
    return factors, oracle


@pytest.mark.parametrize("family", KINDS)
def test_lambda_is_the_diagonal_of_the_fisher_in_the_eigenbasis(family):
    factors, oracle = fit_and_oracle(family)
    for name, dense in oracle.items():
        F, K = dense.F, dense.K
        E = dense_E(factors, name)
        lam = factors.module(name).lambda_OI
        fitted = factors.module(name)
        Q = torch.kron(fitted.basis_OO, fitted.basis_II)
        assert relative(lam.flatten(), torch.diag(Q.T @ F @ Q)) < EXACT
        assert abs(E.trace() - F.trace()) < EXACT * F.trace()
        pythagoras = F.norm() ** 2 - lam.norm() ** 2
        assert abs((F - E).norm() ** 2 - pythagoras) < EXACT * F.norm() ** 2
        assert (F - E).norm() < (F - K).norm()
        assert relative(E, dense.E()) < EXACT
        # The test can fail: K-FAC is far from it.
        assert relative(K, dense.E()) > 0.05


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_has_the_covariances_of_its_hooked_rows(family, tmp_path):
    from safetensors import safe_open

    model, data = build(family), examples(prompts=True)
    factors = estimate_factors(model, data, output=tmp_path / "store", **FIT)
    coverage = factors.manifest["coverage"]
    assert coverage["tracked_parameters"] == coverage["mlp_parameters"] > 0
    assert not coverage["skipped"]
    oracle = dense_modules(model, [shifted(e) for e in data], list(factors.modules))
    for name, module in factors.modules.items():
        for factor, expected in ((module.input, oracle[name].A), (module.output, oracle[name].S)):
            path = tmp_path / "store" / "covariance" / f"{factor}.safetensors"
            with safe_open(path, framework="pt") as file:
                count = int(file.metadata()["count"])
                assert count == oracle[name].M
                assert relative(file.get_tensor("sum") / count, expected) < EXACT
        assert relative(factors.module(name).lambda_OI.sum(), oracle[name].F.trace()) < EXACT


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_per_token_refit_squares_each_position(family):
    factors, oracle = fit_and_oracle(family, refit="per_token")
    for name, dense in oracle.items():
        assert relative(dense_E(factors, name), dense.E(per_token=True)) < EXACT
        assert relative(dense.E(per_token=True), dense.E()) > 0.05


def test_no_refit_is_kfac_in_the_same_scale():
    factors, oracle = fit_and_oracle("llama_bias", refit="none")
    for name, dense in oracle.items():
        assert relative(dense_E(factors, name), dense.K) < EXACT


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_position_is_exact_and_three_are_not(family):
    model = build(family)
    for length, exact in ((2, True), (4, False)):
        data = [{"input_ids": torch.arange(3, 3 + length)}]
        factors = estimate_factors(model, data, **FIT)
        oracle = dense_modules(
            model, [(data[0]["input_ids"][:-1], data[0]["input_ids"][1:])], list(factors.modules)
        )
        errors = [relative(dense_E(factors, n), d.F) for n, d in oracle.items()]
        if exact:
            assert max(errors) < EXACT
        else:
            assert min(errors) > 0.01


def test_sampled_labels_are_those_drawn_by_the_definition():
    model, data = build("llama"), examples(prompts=True)
    factors = estimate_factors(model, data, **(FIT | {"labels": "sampled", "seed": 5}))
    sequences = []
    for index, example in enumerate(data):
        ids, targets = shifted(example)
        uniform = uniforms(5, REFIT_PASS, index, len(ids))
        sequences.append((ids, drawn_targets(model, ids, targets != -100, uniform)))
    oracle = dense_modules(model, sequences, list(factors.modules))
    for name, dense in oracle.items():
        fitted = factors.module(name)
        Q = torch.kron(fitted.basis_OO, fitted.basis_II)
        assert relative(fitted.lambda_OI.flatten(), torch.diag(Q.T @ dense.F @ Q)) < EXACT


def test_the_mean_trace_over_seeds_approaches_the_exact_expectation():
    model, data = build("gpt2"), examples(number=6, longest=5)
    names = list(estimate_factors(model, data, **FIT).modules)
    expected = dict.fromkeys(names, 0.0)
    for example in data:
        ids, _ = shifted(example)
        with torch.no_grad():
            p = torch.softmax(model(input_ids=ids[None], use_cache=False).logits[0], -1)
        # Labels of different positions are independent and their gradients have mean zero, so
        # E‖G‖² is the sum over positions of the expectation over that position's label alone.
        for t in range(len(ids)):
            for label in range(p.shape[1]):
                targets = torch.full((len(ids),), -100)
                targets[t] = label
                one = dense_modules(model, [(ids, targets)], names)
                for name in names:
                    expected[name] += (p[t, label] * one[name].gradients[0].norm() ** 2).item()
    seeds = 60
    traces = {name: [] for name in names}
    for seed in range(seeds):
        factors = estimate_factors(model, data, **(FIT | {"labels": "sampled", "seed": seed}))
        for name in names:
            traces[name].append(factors.module(name).lambda_OI.sum().item())
    for name in names:
        exact = expected[name] / len(data)
        error = np.std(traces[name]) / np.sqrt(seeds)
        assert abs(np.mean(traces[name]) - exact) < 4 * error
        assert error < 0.1 * exact
