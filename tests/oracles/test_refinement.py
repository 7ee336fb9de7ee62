"""Refined scores against a dense solve with the Gauss–Newton matrix of all modules together."""

import functools
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
import torch
from helpers.dense import dense_of_losses, relative
from helpers.dense_families import dense_of
from helpers.directions import flat, gauss_newton, runs_of, with_wide_norms
from helpers.families import tiny_model
from helpers.networks import build, examples, shifted
from helpers.task_models import bert, masked_examples
from test_experts import PICKS, RoutedList
from torch import Tensor
from torch.nn.functional import cross_entropy

from ekfac_dist import Factors, MaskedLM, estimate_factors, influence_scores

CONVERGED = {"method": "cg", "iterations": 4000, "tolerance": 1e-10}
DAMPING = 20.0  # times mean(Λ): few steps converge
NUM_QUERIES = 3


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
    matrices: dict = field(default_factory=dict)

    def G(self, rows=None):
        """Of some training sequences, by index; None: of all."""
        key = tuple(range(len(self.train)) if rows is None else rows)
        if key not in self.matrices:
            sequences = [shifted(self.train[k]) for k in key]
            runs = runs_of(self.model, sequences)
            self.matrices[key] = gauss_newton(self.model, self.factors.modules, runs)
        return self.matrices[key]

    def factors_solution(self, rows):
        """(E + D)⁻¹ of vectors [n, P]."""
        parts = rows.split([m.num_parameters for m in self.factors.modules.values()], 1)
        solved = self.factors.solve(
            {
                name: part.view(len(rows), m.num_outputs, m.input_size)
                for (name, m), part in zip(self.factors.modules.items(), parts, strict=True)
            },
            damping=DAMPING,
        )
        return flat(solved)

    def solved(self, G):
        return torch.linalg.solve(G + torch.diag(self.damping), self.gradients["queries"].T).T

    def expected(self, G):
        return self.solved(G) @ self.gradients["train"].T

    def scores(self, **options):
        options = {"batch_tokens": 25, "top_k": 3, "damping": DAMPING, **options}
        return influence_scores(self.model, self.factors, self.queries, self.train, **options)


def dampings(factors):
    """λ of each parameter [P]."""
    return torch.cat(
        [
            (DAMPING * factors.module(name).lambda_OI.mean()).expand(module.num_parameters)
            for name, module in factors.modules.items()
        ]
    )


@functools.cache
def case(family):
    """Padding and prompts."""
    model = with_wide_norms(tiny_experts() if family == "experts" else build(family))
    train = examples(9, seed=1, prompts=True, longest=7)
    queries = examples(NUM_QUERIES, seed=2, prompts=True, longest=7)
    factors = estimate_factors(model, train, labels="data", accumulate="float64", batch_tokens=20)
    gradients = {}
    for key, rows in (("queries", queries), ("train", train)):
        dense = dense_of(model, factors, rows)
        matrices = {name: torch.stack(dense[name].gradients) for name in factors.modules}
        gradients[key] = flat(matrices).detach()
    return Case(model, factors, queries, train, gradients, dampings(factors))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "llama_bias", "experts"])
def test_refined_scores_are_those_of_the_dense_solve(family):
    """Conv1D, biases, gates, experts; attention, prompts and padding."""
    it = case(family)
    found, plain = it.scores(refine=CONVERGED), it.scores()
    assert relative(found.scores, it.expected(it.G())) < 1e-8
    assert found.refined.num_converged == NUM_QUERIES
    assert found.refined.convergence_in_words.startswith("converged: the residual is at most 1e-10")
    # The plain solution would not pass.
    assert relative(plain.scores, it.expected(it.G())) > 0.01


def test_residuals_are_those_of_dense_matrices():
    it = case("gpt_neox")
    found = it.scores(refine={"method": "cg", "iterations": 3, "tolerance": 0}).refined
    q = it.gradients["queries"]
    matrix = it.G() + torch.diag(it.damping)
    started = it.factors_solution(q)
    expected = (q - started @ matrix).norm(dim=1) / q.norm(dim=1)
    assert relative(found.residuals[:, 0], expected) < 1e-10
    assert (found.num_steps.tolist(), found.num_converged) == ([3] * NUM_QUERIES, 0)
    words = found.convergence_in_words
    assert words.startswith(f"not converged for {NUM_QUERIES} of {NUM_QUERIES} rows of scores")
    assert f"{found.last.max():.3g} at most, above the tolerance 0" in words


def test_the_sequences_of_g_are_drawn_by_the_seed_alone():
    it = case("gpt_neox")
    drawn = sorted(np.random.Generator(np.random.Philox(key=[5, 0])).choice(9, 4, replace=False))
    expected = it.expected(it.G([int(k) for k in drawn]))
    refine = {**CONVERGED, "tolerance": 1e-8, "sequences": 4, "seed": 5}
    for options in ({"batch_tokens": 1}, {"batch_tokens": 100}, {"query_memory_gb": 1e-9}):
        found = it.scores(refine=refine, **options)
        assert relative(found.scores, expected) < 1e-6, options
        assert (found.refined.num_sequences, found.refined.num_training) == (4, 9)
    others = it.scores(refine=refine | {"seed": 6})
    assert relative(others.scores, expected) > 1e-3


def test_g_is_of_the_training_data_not_of_the_scored_sequences():
    it = case("gpt_neox")
    found = it.scores(refine=CONVERGED, candidates=[2, 5], top_k=2)
    assert relative(found.scores, it.expected(it.G())[:, [2, 5]]) < 1e-8


def test_blocks_of_queries_change_nothing():
    it = case("llama")
    refine = {"method": "cg", "iterations": 4, "tolerance": 0}
    whole = it.scores(refine=refine, per_token="top")
    each = it.scores(refine=refine, per_token="top", query_memory_gb=1e-9)
    assert (whole.num_scans, each.num_scans) == (1, NUM_QUERIES)
    assert relative(each.scores, whole.scores) < 1e-10
    assert relative(each.refined.residuals, whole.refined.residuals) < 1e-10


@pytest.mark.parametrize("memory", [4.0, 6e-5])
def test_low_rank_and_re_scoring_are_of_refined_gradients(memory):
    it = case("gpt2")
    refine = {"method": "cg", "iterations": 4, "tolerance": 0}
    exact = it.scores(refine=refine)
    full = it.scores(refine=refine, rank=99, query_memory_gb=memory)
    assert relative(full.scores, exact.scores) < 1e-10
    twice = it.scores(refine=refine, rank=1, rescore=9, query_memory_gb=memory, per_token="top")
    assert relative(twice.scores, exact.scores) > 1e-3
    for row in range(NUM_QUERIES):
        columns = twice.top[row].columns
        assert relative(twice.top[row].scores, exact.scores[row, columns]) < 1e-10


def test_details_and_parts_sum_to_refined_scores():
    it = case("llama_bias")
    refine = {"method": "cg", "iterations": 3}
    found = it.scores(refine=refine, per_token="top", per_module=True, per_layer=True)
    assert relative(found.module_scores.sum(1), found.scores) < 1e-10
    assert relative(found.layer_scores.sum(1), found.scores) < 1e-10
    details = found.details
    for pair, (row, column) in enumerate(zip(details.rows, details.columns, strict=True)):
        score = found.scores[row, column].item()
        assert details.module_scores[pair].sum().item() == pytest.approx(score, rel=1e-8)


def test_a_group_of_queries_is_refined_as_their_sum():
    it = case("gpt_neox")
    grouped = [{**query, "group": "all"} for query in it.queries]
    options = {"batch_tokens": 10, "top_k": 2, "damping": DAMPING, "refine": CONVERGED}
    found = influence_scores(it.model, it.factors, grouped, it.train, **options)
    assert relative(found.scores[0], it.expected(it.G()).sum(0)) < 1e-8


def test_astra_with_all_sequences_in_each_step_reaches_the_dense_solve():
    it = case("gpt_neox")
    steps = {"iterations": 60, "batch": 9, "step_size": 0.3, "momentum": 0.3}
    found = it.scores(refine={"method": "astra", **steps})
    assert relative(found.scores, it.expected(it.G())) < 1e-3
    assert relative(it.scores().scores, it.expected(it.G())) > 0.05
    assert found.refined.num_converged is None
    assert "after 60 steps" in found.refined.convergence_in_words


def test_each_step_of_astra_has_sequences_of_its_own():
    it = case("gpt_neox")
    settings = {"iterations": 2, "batch": 3, "step_size": 0.2, "momentum": 0.5, "seed": 7}
    found = it.scores(refine={"method": "astra", **settings})
    q, x, m = it.gradients["queries"], it.factors_solution(it.gradients["queries"]), 0
    for step in range(2):
        draw = np.random.Generator(np.random.Philox(key=[7, step])).choice(9, 3, replace=False)
        matrix = it.G([int(k) for k in draw]) + torch.diag(it.damping)
        m = 0.5 * m + it.factors_solution(x @ matrix - q)
        x = x - 0.2 * m
    assert relative(found.scores, x @ it.gradients["train"].T) < 1e-8


def test_other_tasks_are_refined():
    model, task, train, queries = bert(), MaskedLM(), masked_examples(6), masked_examples(2, seed=1)
    factors = estimate_factors(model, train, labels="data", accumulate="float64", task=task)
    options = {"task": task, "damping": DAMPING, "top_k": 2}
    found = influence_scores(model, factors, queries, train, refine=CONVERGED, **options)
    plain = influence_scores(model, factors, queries, train, **options)

    def run(example):
        inputs = {n: torch.as_tensor(v)[None] for n, v in example.items() if n != "labels"}
        labels = torch.as_tensor(example["labels"])
        return model(**inputs).logits[0][labels != -100], labels[labels != -100]

    G = gauss_newton(model, factors.modules, [partial(run, example) for example in train])
    q, z = (flat(weight_gradients(model, factors, run, rows)) for rows in (queries, train))
    matrix = G + torch.diag(dampings(factors))
    expected = q @ torch.linalg.solve(matrix, z.T)
    assert relative(found.scores, expected) < 1e-8
    assert relative(plain.scores, expected) > 0.01


def weight_gradients(model, factors, run, rows):
    losses = [lambda row=row: cross_entropy(*run(row), reduction="sum") for row in rows]
    dense = dense_of_losses(model, losses, list(factors.modules))
    return {name: torch.stack(module.gradients) for name, module in dense.items()}


def test_experts_in_lists_are_refined_as_fused_ones():
    train, queries = examples(6, prompts=True), examples(2, seed=4)
    fused, listed = (tiny_model("MixtralForCausalLM") for _ in range(2))
    for layer in listed.model.layers:
        layer.mlp.experts = RoutedList(layer.mlp.experts, PICKS["tokens[index]"])
    options = {"refine": {"method": "cg", "iterations": 2}, "damping": DAMPING, "top_k": 2}
    found = []
    for model in (fused, listed):
        factors = estimate_factors(model, train, labels="data", accumulate="float64")
        found.append(influence_scores(model, factors, queries, train, **options))
    assert relative(found[1].scores, found[0].scores) < 1e-6  # norms are in float32
    assert relative(found[1].refined.residuals, found[0].refined.residuals) < 1e-6


def test_stored_factors_are_never_changed(tmp_path):
    model, train = build("gpt2"), examples(6, seed=1)
    factors = estimate_factors(model, train, labels="data", output=tmp_path / "store")
    files = sorted(path for path in (tmp_path / "store").rglob("*") if path.is_file())
    before = [path.read_bytes() for path in files]
    refine = {"method": "cg", "iterations": 2}
    influence_scores(model, factors, train[:2], train, refine=refine, top_k=2)
    assert [path.read_bytes() for path in files] == before
