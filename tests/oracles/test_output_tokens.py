"""What each position's loss does, by a loop of plain autograd and dense matrices, in float64."""

import functools

import numpy as np
import pytest
import torch
from helpers.dense import relative
from helpers.dense_scores import DenseScores
from helpers.directions import with_wide_norms
from helpers.families import tiny_model
from helpers.networks import KINDS, build, examples, shifted
from helpers.task_models import bert, classified_examples, masked_examples, t5, translated_examples
from torch.nn.functional import cross_entropy
from transformers import BertForSequenceClassification

from ekfac_dist import (
    MaskedLM,
    Seq2SeqLM,
    SequenceClassification,
    estimate_factors,
    influence_scores,
)
from ekfac_dist.errors import ConfigError, ModelError
from ekfac_dist.influence import data_passes

EXPERTS = ("MixtralForCausalLM", "GptOssForCausalLM")
EXACT = 1e-10
ROUNDED = 1e-5  # where a model computes something in float32
NUM_QUERIES, NUM_TRAIN = 3, 9


class Case:
    """A model with factors, queries of which one is a contrast, and training sequences."""

    def __init__(self, family):
        self.model = with_wide_norms(build(family) if family in KINDS else tiny_model(family))
        self.train = examples(NUM_TRAIN, seed=1, prompts=True)
        *self.queries, other = examples(NUM_QUERIES + 1, seed=2, prompts=True)
        self.queries[1]["against"] = other
        settings = {"labels": "data", "accumulate": "float64", "batch_tokens": 20}
        self.factors = estimate_factors(self.model, self.train, **settings)

    def ask(self, **options):
        defaults = {"batch_tokens": 60, "per_token": "top", "top_k": NUM_TRAIN, "bottom_k": 0}
        options = {**defaults, "tokens": "outputs", **options}
        return influence_scores(self.model, self.factors, self.queries, self.train, **options)


@functools.cache
def case(family):
    return Case(family)


def positions_of(details, row, column):
    """[layers, positions] of a pair."""
    (pair,) = np.flatnonzero((details.rows == row) & (details.columns == column))
    return details.layer_token_scores[:, details.offsets[pair] : details.offsets[pair + 1]]


def gradients_of_positions(model, names, example):
    """{module: [T, O, I]}, one position's loss at a time; of the very weights that are tracked."""
    ids, targets = shifted(example)
    found = {name: [] for name in names}
    weights = {name: model.get_submodule(name) for name in names}
    for position in range(len(ids)):
        logits = model(input_ids=ids[None], use_cache=False).logits[0, position]
        loss = cross_entropy(logits[None], targets[None, position], reduction="sum")
        parameters = [p for name in names for p in weights[name].parameters()]
        gradients = iter(torch.autograd.grad(loss, parameters))
        for name in names:
            by_kind = {n: next(gradients) for n, _ in weights[name].named_parameters()}
            matrix = by_kind["weight"]
            if type(weights[name]).__name__ == "Conv1D":
                matrix = matrix.T
            if "bias" in by_kind:
                matrix = torch.cat([matrix, by_kind["bias"][:, None]], 1)
            found[name].append(matrix)
    return {name: torch.stack(each) for name, each in found.items()}


# -- against dense matrices ------------------------------------------------------------------------


@pytest.mark.parametrize("per_token", ["top", "all"])
@pytest.mark.parametrize("family", KINDS)
def test_they_are_each_positions_gradient_solved_by_dense_matrices(family, per_token):
    it = case(family)
    names = list(it.factors.modules)
    dense = DenseScores(it.model, names, it.train)
    own = dense.gradients(it.queries)
    other = dense.gradients([it.queries[1]["against"]])
    found = it.ask(per_token=per_token)
    for column in (0, 4):
        gradients = gradients_of_positions(it.model, names, it.train[column])
        for row in range(NUM_QUERIES):
            by_module = []
            for name in names:
                q = own[name][row] - (other[name][0] if row == 1 else 0)
                by_module.append(gradients[name].flatten(1) @ (dense.inverse[name] @ q))
            layers = torch.stack(by_module).view(2, -1, len(by_module[0])).sum(1)
            assert relative(positions_of(found.details, row, column), layers) < EXACT
            if per_token == "all":
                start, end = found.token_offsets[column : column + 2]
                assert relative(found.token_scores[row, start:end], layers.sum(0)) < EXACT


@pytest.mark.parametrize("family", [*KINDS, *EXPERTS])
def test_a_sequences_positions_sum_to_its_score_and_unlabelled_ones_have_none(family):
    it = case(family)
    found, inputs = (it.ask(tokens=of, per_token="all") for of in ("outputs", "inputs"))
    tolerance = ROUNDED if family == "MixtralForCausalLM" else EXACT
    assert (found.tokens, inputs.tokens) == ("outputs", "inputs")
    assert relative(found.scores, inputs.scores) < EXACT
    for column, example in enumerate(it.train):
        start, end = found.token_offsets[column : column + 2]
        positions = found.token_scores[:, start:end]
        assert relative(positions.sum(1), found.scores[:, column]) < tolerance
        assert (positions[:, shifted(example)[1] == -100] == 0).all()
        for row in range(NUM_QUERIES):
            layers = positions_of(found.details, row, column)
            assert relative(layers.sum(0), positions[row]) < tolerance
    assert relative(found.token_scores, inputs.token_scores) > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"batch_tokens": 1},
        {"batch_tokens": 1000},
        {"query_memory_gb": 1e-9},
        {"self_influence": True},
        {"rank": 99},
        {"rank": 99, "self_influence": True},
        {"gradient_checkpointing": True},
    ],
)
@pytest.mark.parametrize("family", ["llama_bias", "GptOssForCausalLM"])
def test_batches_blocks_bases_and_ranks_change_nothing(family, options):
    it = case(family)
    plain = it.ask(per_token="all")
    found = it.ask(per_token="all", **options)
    assert relative(found.token_scores, plain.token_scores) < EXACT
    for row in range(NUM_QUERIES):
        for column in range(NUM_TRAIN):
            one, other = (positions_of(x.details, row, column) for x in (found, plain))
            assert relative(one, other) < EXACT


@pytest.mark.parametrize("normalize", ["cosine", "relatif_theta"])
def test_they_are_divided_by_the_norms_of_the_scores(normalize):
    it = case("gpt2")
    found = it.ask(normalize=normalize, per_token="all", top_k=2, bottom_k=1)
    starts = found.token_offsets
    sums = [found.token_scores[:, starts[n] : starts[n + 1]].sum(1) for n in range(NUM_TRAIN)]
    assert relative(torch.stack(sums, 1), found.scores) < EXACT
    for pair, (row, column) in enumerate(
        zip(found.details.rows.tolist(), found.details.columns.tolist(), strict=True)
    ):
        start, end = found.details.offsets[pair : pair + 2]
        summed = found.details.token_scores[start:end].sum()
        assert summed.item() == pytest.approx(found.scores[row, column].item(), rel=1e-8)


def test_after_a_low_rank_scan_the_listed_ones_are_exact():
    it = case("llama")
    exact = it.ask()
    found = it.ask(rank=1, rescore=6, top_k=3, bottom_k=2)
    assert relative(found.scores, exact.scores) > 0.01
    assert len(found.details.rows) < NUM_QUERIES * NUM_TRAIN
    for row, column in zip(
        found.details.rows.tolist(), found.details.columns.tolist(), strict=True
    ):
        one, other = (positions_of(x.details, row, column) for x in (found, exact))
        assert relative(one, other) < EXACT


@pytest.mark.parametrize("options", [{}, {"rank": 2}])
def test_they_are_along_refined_gradients_too(options):
    it = case("gpt2")
    refine = {"method": "cg", "iterations": 3, "tolerance": 0}
    found = it.ask(per_token="all", refine=refine, **options)
    starts = found.token_offsets
    sums = [found.token_scores[:, starts[n] : starts[n + 1]].sum(1) for n in range(NUM_TRAIN)]
    assert relative(torch.stack(sums, 1), found.scores) < EXACT
    assert relative(found.scores, it.ask().scores) > 0.01


# -- tasks -----------------------------------------------------------------------------------------


def test_a_masked_tokens_loss_is_at_its_own_position():
    model, train = bert(), masked_examples(5)
    factors = estimate_factors(model, train, labels="data", task=MaskedLM())
    queries = masked_examples(2, seed=5)
    options = {"task": MaskedLM(), "per_token": "all", "tokens": "outputs", "batch_tokens": 100}
    found = influence_scores(model, factors, queries, train, **options)
    for column, example in enumerate(train):
        start, end = found.token_offsets[column : column + 2]
        positions = found.token_scores[:, start:end]
        assert relative(positions.sum(1), found.scores[:, column]) < EXACT
        assert ((positions != 0).all(0).numpy() == (example["labels"] != -100)).all()


def test_a_translations_losses_are_at_the_decoders_positions_behind_the_encoders():
    model, train = t5(), translated_examples(5)
    factors = estimate_factors(model, train, labels="data", task=Seq2SeqLM())
    queries = translated_examples(2, seed=5)
    options = {"task": Seq2SeqLM(), "per_token": "all", "tokens": "outputs", "batch_tokens": 100}
    found = influence_scores(model, factors, queries, train, **options)
    for column, example in enumerate(train):
        start, end = found.token_offsets[column : column + 2]
        positions = found.token_scores[:, start:end]
        assert relative(positions.sum(1), found.scores[:, column]) < ROUNDED
        encoder = len(example["input_ids"])
        assert (positions[:, :encoder] == 0).all()
        assert (positions[:, encoder:] != 0).all()


# -- what is refused -------------------------------------------------------------------------------


def test_a_loss_of_whole_sequences_is_refused_before_the_work(monkeypatch):
    model, train = bert(BertForSequenceClassification), classified_examples(4)
    task = SequenceClassification()
    factors = estimate_factors(model, train, labels="data", task=task)
    monkeypatch.setattr(data_passes, "run_pass", None)
    with pytest.raises(ConfigError, match="the loss of the task SequenceClassification is a sequ"):
        influence_scores(
            model, factors, train[:1], train, task=task, per_token="top", tokens="outputs"
        )


class Undifferentiable(torch.autograd.Function):
    """The identity, whose backward has no derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient.clone()


class Wrong(torch.autograd.Function):
    """The identity, whose backward's derivative is wrong."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.detach() + 0 * gradient


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (Undifferentiable, "backward cannot be differentiated .*scores.tokens: outputs needs; set"),
        (Wrong, "do not sum to the sequences' scores"),
    ],
)
def test_a_backward_without_a_derivative_is_refused(function, says):
    it = Case("llama")
    norm = it.model.model.norm
    handle = norm.register_forward_hook(lambda module, args, output: function.apply(output))
    with pytest.raises(ModelError, match=says):
        it.ask(allow_changes=True)
    handle.remove()


def test_without_scores_of_positions_there_is_nothing_to_be_of_outputs():
    with pytest.raises(ConfigError, match=r"scores\.per_token is none, so no position has a score"):
        case("llama").ask(per_token="none")
