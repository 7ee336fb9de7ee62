"""A contrast is the difference of two queries: by dense autograd, and by both queries alone."""

import functools
import math

import pytest
import torch
from helpers.dense import relative
from helpers.dense_scores import DenseScores
from helpers.families import tiny_model
from helpers.networks import KINDS, build, examples
from helpers.task_models import VOCAB, bert, masked_examples

from ekfac_dist import MaskedLM, estimate_factors, influence_scores

NUM_TRAIN = 14


class Case:
    """A model with factors, training sequences, and queries three of which are contrasts."""

    def __init__(self, family):
        self.model = build(family) if family in KINDS else tiny_model(family)
        self.train = examples(NUM_TRAIN, seed=1, prompts=True)
        settings = {"labels": "data", "accumulate": "float64", "batch_tokens": 20}
        self.factors = estimate_factors(self.model, self.train, **settings)
        own, others = examples(5, seed=2, prompts=True), examples(5, seed=3, prompts=True)
        self.own, self.others = own, others
        self.queries = [
            {**query, "against": other} if k in (1, 2, 4) else query
            for k, (query, other) in enumerate(zip(own, others, strict=True))
        ]

    def ask(self, queries, **options):
        options = {"batch_tokens": 25, "top_k": 3, **options}
        return influence_scores(self.model, self.factors, queries, self.train, **options)

    @functools.cached_property
    def plain(self):
        """Scores of both sides of every contrast as queries of their own [10, N]."""
        return self.ask([*self.own, *self.others])

    @property
    def difference(self):
        own, others = self.plain.scores.split(5)
        is_contrast = torch.tensor([False, True, True, False, True])[:, None]
        return own - torch.where(is_contrast, others, 0)


@functools.cache
def case(family):
    return Case(family)


def grouped(it):
    return [{**q, "group": g} if g else q for q, g in zip(it.queries, "ab ab", strict=True)]


@pytest.mark.parametrize("family", KINDS)
def test_a_contrast_is_the_dense_difference(family):
    it = case(family)
    dense = DenseScores(it.model, it.factors.modules, it.train)
    own, others = (dense.scores(queries, it.train) for queries in (it.own, it.others))
    found = it.ask(it.queries)
    for k in range(5):
        expected = own[k] - others[k] if k in (1, 2, 4) else own[k]
        assert relative(found.scores[k], expected) < 1e-10


@pytest.mark.parametrize(
    "options",
    [
        {"batch_tokens": 1},
        {"batch_tokens": 1000},
        {"query_memory_gb": 1e-9},
        {"self_influence": True},
        {"rank": 99},
    ],
)
@pytest.mark.parametrize("family", ["llama", "MixtralForCausalLM"])
def test_batches_blocks_and_the_eigenbasis_change_nothing(family, options):
    it = case(family)
    assert relative(it.ask(it.queries, **options).scores, it.difference) < 1e-10


def test_a_group_sums_its_contrasts_and_its_queries():
    it = case("gpt2")
    found = it.ask(grouped(it), per_token="top", per_module=True)
    rows = it.difference
    expected = torch.stack([rows[0] + rows[3], rows[1] + rows[4], rows[2]])
    assert relative(found.scores, expected) < 1e-10
    assert relative(found.module_scores.sum(1), expected) < 1e-10


@pytest.mark.parametrize("per_token", ["top", "all"])
def test_positions_and_layers_are_differences_too(per_token):
    it = case("gpt_neox")
    options = {"top_k": NUM_TRAIN, "bottom_k": 0, "per_token": per_token}
    found, plain = it.ask(it.queries[1:2], **options), it.ask([it.own[1], it.others[1]], **options)
    if per_token == "all":
        own, others = plain.token_scores
        assert relative(found.token_scores[0], own - others) < 1e-10
    own, others = (plain.details.take((plain.details.rows == row).nonzero()[0]) for row in (0, 1))
    assert found.details.columns.tolist() == own.columns.tolist() == others.columns.tolist()
    expected = own.layer_token_scores - others.layer_token_scores
    assert relative(found.details.layer_token_scores, expected) < 1e-10
    assert relative(found.details.module_scores, own.module_scores - others.module_scores) < 1e-10


def test_a_cosine_is_of_the_differences_norm():
    it = case("llama")
    dense = DenseScores(it.model, it.factors.modules, it.train)
    own, other = (dense.gradients([queries[1]]) for queries in (it.own, it.others))
    differences = {name: own[name] - other[name] for name in own}
    norm = sum(d @ dense.inverse[name] @ d.T for name, d in differences.items()).sqrt()
    expected = it.difference[1] / norm / dense.self_influence(it.train).sqrt()
    found = it.ask(it.queries[1:2], normalize="cosine", training_size=50)
    assert relative(found.scores, expected) < 1e-10
    assert relative(found.nats * 50, it.difference[1:2]) < 1e-10


def test_low_rank_gradients_are_of_the_difference_and_lists_end_exact():
    it = case("llama")
    found = it.ask(it.queries, rank=1, rescore=4, per_token="top")
    assert relative(found.scores, it.difference) > 0.01  # the scan's
    for row, rescored in enumerate(found.rescored):
        exact = it.difference[row][torch.from_numpy(rescored.columns)]
        assert relative(rescored.exact_scores, exact) < 1e-9


def test_a_refined_contrast_is_the_difference_of_refined_queries():
    it = case("llama")
    refine = {"method": "cg", "iterations": 400, "tolerance": 1e-10}
    options = {"refine": refine, "damping": 10.0, "training_size": 50}  # large: few iterations
    plain = it.ask([it.own[1], it.others[1]], **options)
    found = it.ask(it.queries[1:2], **options)
    assert relative(found.scores[0], plain.scores[0] - plain.scores[1]) < 1e-6
    assert relative(found.scores[0], it.difference[1]) > 0.01
    assert found.losses == pytest.approx([plain.losses[0] - plain.losses[1]])


def test_both_losses_are_told_and_only_a_query_that_is_no_contrast_has_a_most_to_gain():
    it = case("opt")
    found, losses = it.ask(it.queries), it.plain.query_losses
    assert found.query_losses == pytest.approx(losses[:5])
    wanted = [losses[5 + k] if k in (1, 2, 4) else None for k in range(5)]
    for loss, expected in zip(found.against_losses, wanted, strict=True):
        assert loss == (None if expected is None else pytest.approx(expected))
    assert found.losses[:2] == pytest.approx([losses[0], losses[1] - losses[6]])
    assert [math.isinf(gain) for gain in found.gains] == [False, True, True, False, True]
    assert found.gains[3] == found.losses[3] == pytest.approx(losses[3])
    mixed = it.ask([{**it.own[0], "group": "a"}, {**it.queries[1], "group": "a"}])
    assert mixed.losses == pytest.approx([losses[0] + losses[1] - losses[6]])
    assert mixed.gains == [math.inf]


def test_examples_of_another_task_are_against_examples_of_theirs():
    model, train = bert(), masked_examples(8)
    factors = estimate_factors(model, train, labels="data", task=MaskedLM())
    query = masked_examples(1, seed=5)[0]
    labels = torch.as_tensor(query["labels"])
    other = {**query, "labels": torch.where(labels == -100, -100, (labels + 1) % VOCAB)}
    ask = functools.partial(influence_scores, model, factors, train=train, task=MaskedLM())
    plain, found = ask(queries=[query, other]), ask(queries=[{**query, "against": other}])
    assert relative(found.scores[0], plain.scores[0] - plain.scores[1]) < 1e-10
