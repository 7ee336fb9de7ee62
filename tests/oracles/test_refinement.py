"""Refined scores against a dense solve with the Gauss–Newton matrix of all modules together."""

import functools
from dataclasses import dataclass

import pytest
import torch
from helpers.dense import relative
from helpers.dense_families import dense_of
from helpers.directions import flat, gauss_newton, runs_of, with_wide_norms
from helpers.families import tiny_model
from helpers.networks import build, examples, shifted
from torch import Tensor

from ekfac_dist import Factors, estimate_factors, influence_scores

CONVERGED = {"method": "cg", "iterations": 4000, "tolerance": 1e-10}
DAMPING = 20.0


def tiny_experts():
    sizes = {"hidden_size": 8, "intermediate_size": 5, "num_local_experts": 3, "head_dim": 4}
    return tiny_model("GptOssForCausalLM", **sizes)


@dataclass
class Case:
    """A model with factors, queries and training sequences, and what dense matrices say."""

    model: torch.nn.Module
    factors: Factors
    queries: list
    train: list
    gradients: dict  # [n, P] of "queries" and "train"
    damping: Tensor  # λ of each parameter [P]

    def G(self, rows):
        sequences = [shifted(row) for row in rows]
        return gauss_newton(self.model, self.factors.modules, runs_of(self.model, sequences))

    def solved(self, G):
        return torch.linalg.solve(G + torch.diag(self.damping), self.gradients["queries"].T).T

    def expected(self, G):
        return self.solved(G) @ self.gradients["train"].T

    def scores(self, **options):
        options = {"batch_tokens": 25, "top_k": 3, "damping": DAMPING, **options}
        return influence_scores(self.model, self.factors, self.queries, self.train, **options)


@functools.cache
def case(family):
    """Padding and prompts."""
    model = with_wide_norms(tiny_experts() if family == "experts" else build(family))
    train = examples(9, seed=1, prompts=True, longest=7)
    queries = examples(3, seed=2, prompts=True, longest=7)
    factors = estimate_factors(model, train, labels="data", accumulate="float64", batch_tokens=20)
    damping = []
    for name, module in factors.modules.items():
        value = DAMPING * factors.module(name).lambda_OI.mean()
        damping.append(value.expand(module.num_parameters))
    gradients = {}
    for key, rows in (("queries", queries), ("train", train)):
        dense = dense_of(model, factors, rows)
        matrices = {name: torch.stack(dense[name].gradients) for name in factors.modules}
        gradients[key] = flat(matrices).detach()
    return Case(model, factors, queries, train, gradients, torch.cat(damping))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "llama_bias", "experts"])
def test_refined_scores_are_those_of_the_dense_solve(family):
    """Conv1D, biases, gates, experts; attention, prompts and padding."""
    it = case(family)
    G = it.G(it.train)
    found, plain = it.scores(refine=CONVERGED), it.scores()
    assert relative(found.scores, it.expected(G)) < 1e-8
    assert found.refined.num_converged == 3
    # The plain solution would not pass.
    assert relative(plain.scores, it.expected(G)) > 0.01
