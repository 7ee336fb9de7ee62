"""Scores against dense matrices and plain autograd."""

import numpy as np
import pytest
import torch
from dense import relative
from dense_scores import DenseScores
from networks import KINDS, build, examples

from ekfac_dist import estimate_factors, influence_scores


def fitted(family, number=14, prompts=True):
    model = build(family)
    train = examples(number, seed=1, prompts=prompts)
    factors = estimate_factors(model, train, labels="data", accumulate="float64", batch_tokens=20)
    return model, train, factors


@pytest.mark.parametrize("family", KINDS)
def test_scores_are_the_dense_ones(family):
    model, train, factors = fitted(family)
    queries = examples(5, seed=2, prompts=True)
    found = influence_scores(
        model, factors, queries, train, batch_tokens=25, per_module=True, per_layer=True
    )
    dense = DenseScores(model, factors.modules, train)
    expected = dense.per_module(queries, train)
    assert relative(found.scores, expected.sum(1)) < 1e-10
    assert relative(found.module_scores, expected) < 1e-10
    assert relative(found.layer_scores.sum(1), found.scores) < 1e-10
    plain = torch.stack(
        [sum(q[k] @ z[j] for q, z in ((g, h) for g, h in zip(dense.gradients(queries).values(), dense.gradients(train).values(), strict=True))) for k in range(5) for j in range(len(train))]
    ).view(5, -1)
    assert relative(found.scores / found.scores.norm(), plain / plain.norm()) > 0.1
