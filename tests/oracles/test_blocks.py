"""Factors of several diagonal blocks are those of dense block-diagonal covariances."""

import numpy as np
import pytest
import torch
from helpers.dense import dense_E, dense_lambda, dense_modules, relative
from helpers.dense_scores import DenseScores
from helpers.networks import KINDS, build, examples, shifted
from helpers.scan_paths import PATHS, force_path
from helpers.workshop import rewrite_manifest
from safetensors import safe_open

from ekfac_dist import estimate_factors, influence_scores, load_factors
from ekfac_dist.curvature.blocks import block_sizes, num_elements
from ekfac_dist.errors import ConfigError, StoreError
from ekfac_dist.report.inspection import inspect_store

EXACT = 1e-10
FIT = {"labels": "data", "accumulate": "float64", "batch_tokens": 24}


def diagonal_blocks(matrix, number):
    """The matrix without what is between its blocks."""
    kept = torch.zeros_like(matrix)
    for part in np.array_split(np.arange(len(matrix)), number):
        kept[part[0] : part[-1] + 1, part[0] : part[-1] + 1] = matrix[
            part[0] : part[-1] + 1, part[0] : part[-1] + 1
        ]
    return kept


def dense_block_E(dense, number):
    A, S = diagonal_blocks(dense.A, number), diagonal_blocks(dense.S, number)
    lam = dense_lambda(A, S, dense.gradients, dense.N)
    Q = torch.kron(torch.linalg.eigh(S).eigenvectors, torch.linalg.eigh(A).eigenvectors)
    return Q @ torch.diag(lam.flatten()) @ Q.T


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("blocks", [2, 3])
def test_a_fit_with_blocks_is_the_dense_block_diagonal_one(family, blocks, tmp_path):
    model, data = build(family), examples(prompts=True)
    factors = estimate_factors(model, data, output=tmp_path / "store", blocks=blocks, **FIT)
    oracle = dense_modules(model, [shifted(e) for e in data], list(factors.modules))
    for name, module in factors.modules.items():
        dense = oracle[name]
        expected = dense_block_E(dense, blocks)
        assert relative(dense_E(factors, name), expected) < EXACT
        assert relative(expected, dense.E()) > 1e-3  # blocks do make a difference
        assert factors.module(name).lambda_OI.sum() == pytest.approx(dense.F.trace().item())
        for factor, whole in ((module.input, dense.A), (module.output, dense.S)):
            path = tmp_path / "store" / "covariance" / f"{factor}.safetensors"
            with safe_open(path, framework="pt") as file:
                assert set(file.keys()) == {f"sum.{k}" for k in range(blocks)}
                found = torch.block_diag(*(file.get_tensor(f"sum.{k}") for k in range(blocks)))
                assert int(file.metadata()["count"]) == dense.M
            assert relative(found / dense.M, diagonal_blocks(whole, blocks)) < EXACT
            path = tmp_path / "store" / "eigenbasis" / f"{factor}.safetensors"
            with safe_open(path, framework="pt") as file:
                names = ("eigenvectors", "eigenvalues")
                assert set(file.keys()) == {f"{n}.{k}" for n in names for k in range(blocks)}
                assert float(file.metadata()["residual"]) < 1e-12


@pytest.mark.parametrize(
    "settings",
    [{"refit": "per_token"}, {"refit": "none"}, {"partitions": 2}, {"batch_tokens": 1}],
)
def test_solves_of_every_kind_of_fit_invert_it(settings):
    factors = estimate_factors(
        build("gpt2"), examples(9), blocks=2, **(FIT | {"labels": "sampled"} | settings)
    )
    for name, module in factors.modules.items():
        gradient = torch.randn(module.num_outputs, module.input_size, dtype=torch.float64)
        damping = 0.01 * factors.module(name).lambda_OI.mean().item()
        solved = factors.solve({name: gradient}, damping, relative=False)[name]
        E = dense_E(factors, name)
        damped = E + damping * torch.eye(len(E), dtype=torch.float64)
        expected = torch.linalg.solve(damped, gradient.flatten())
        assert relative(solved.flatten(), expected) < 1e-8


@pytest.mark.parametrize("options", [{}, {"self_influence": True}, {"rank": 1000}])
def test_queries_are_answered_as_with_the_dense_block_diagonal_factors(options, monkeypatch):
    model, train = build("llama_bias"), examples(9, prompts=True)
    queries = examples(3, seed=2, prompts=True)
    factors = estimate_factors(model, train, blocks=2, **FIT)
    dense = DenseScores(model, factors.modules, train)
    oracle = dense_modules(model, [shifted(e) for e in train], list(factors.modules))
    for name, module in oracle.items():
        E = dense_block_E(module, 2)
        identity = torch.eye(len(E), dtype=E.dtype)
        dense.inverse[name] = torch.linalg.inv(E + 0.1 * E.trace() / len(E) * identity)
    expected = dense.scores(queries, train)
    for path in PATHS:
        with monkeypatch.context() as patch:
            force_path(patch, path)
            found = influence_scores(model, factors, queries, train, batch_tokens=25, **options)
        assert relative(found.scores, expected) < EXACT, path


def test_blocks_may_be_as_small_as_one_coordinate(tmp_path):
    model, data = build("llama_bias"), examples(5)
    factors = estimate_factors(model, data, output=tmp_path / "store", blocks=1000, **FIT)
    for name in factors.modules:
        for basis in (factors.module(name).basis_II, factors.module(name).basis_OO):
            assert torch.equal(basis.abs(), torch.eye(len(basis), dtype=torch.float64))
    said = inspect_store(tmp_path / "store")
    assert "model.layers.1.mlp.down_proj" in said
    reloaded = load_factors(tmp_path / "store", model=model)
    for name in factors.modules:
        assert torch.equal(reloaded.module(name).lambda_OI, factors.module(name).lambda_OI)


def test_sizes_are_about_equal_and_none_is_empty():
    assert block_sizes(10, 3) == [4, 3, 3]
    assert block_sizes(4, 4) == [1, 1, 1, 1]
    assert block_sizes(3, 5) == [1, 1, 1]
    assert block_sizes(7, 1) == [7]
    assert num_elements(10, 3) == 16 + 9 + 9


def test_a_number_of_blocks_that_cannot_be_meant_is_refused(tmp_path):
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match=r"factors\.blocks is .*whole number of 1 or more"):
            estimate_factors(build("llama"), examples(2), blocks=wrong)
    estimate_factors(build("llama"), examples(2), output=tmp_path / "store", **FIT)
    for wrong in (0, "2", 2):
        rewrite_manifest(
            tmp_path / "store", lambda m, wrong=wrong: m["config"]["factors"].update(blocks=wrong)
        )
        says = "holds no tensor 'eigenvectors.0'" if wrong == 2 else f"have {wrong!r} blocks"
        with pytest.raises(StoreError, match=says):
            load_factors(tmp_path / "store").module("model.layers.0.mlp.up_proj")
