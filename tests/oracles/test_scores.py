"""Scores against dense matrices and plain autograd, in float64."""

import functools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers.dense import relative
from helpers.dense_scores import DenseScores
from helpers.networks import KINDS, build, examples
from helpers.scan_paths import PATHS, force_path
from torch import Tensor

from ekfac_dist import Factors, estimate_factors, influence_scores
from ekfac_dist.errors import NonFiniteError

NUM_QUERIES, NUM_TRAIN = 5, 14


@dataclass
class Case:
    """A model with factors, queries and training sequences, and what dense matrices say."""

    model: torch.nn.Module
    factors: Factors
    queries: list
    train: list
    per_module: Tensor  # [Q, modules, N]
    dense: DenseScores

    def scores(self, **options):
        options = {"batch_tokens": 25, "top_k": 3, **options}
        return influence_scores(self.model, self.factors, self.queries, self.train, **options)

    @property
    def expected(self):
        return self.per_module.sum(1)


@functools.cache
def case(family):
    """Padding, prompts and anisotropic inputs; curvature of the data's own labels."""
    model = build(family)
    train = examples(NUM_TRAIN, seed=1, prompts=True)
    queries = examples(NUM_QUERIES, seed=2, prompts=True)
    factors = estimate_factors(model, train, labels="data", accumulate="float64", batch_tokens=20)
    dense = DenseScores(model, factors.modules, train)
    return Case(model, factors, queries, train, dense.per_module(queries, train), dense)


def plain_dot_product(it):
    q, z = it.dense.gradients(it.queries), it.dense.gradients(it.train)
    return sum(q[name] @ z[name].T for name in q)


# -- scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
def test_scores_are_the_dense_ones(family):
    it = case(family)
    found = it.scores()
    assert relative(found.scores, it.expected) < 1e-10
    # A wrong basis would pass if the curvature did not matter here. It does.
    identity = plain_dot_product(it)
    assert relative(identity / identity.norm(), it.expected / it.expected.norm()) > 0.1


@pytest.mark.parametrize("family", KINDS)
def test_scores_are_the_dense_ones_in_the_eigenbasis_too(family):
    it = case(family)
    found = it.scores(self_influence=True, per_module=True)
    assert relative(found.module_scores, it.per_module) < 1e-10
    assert relative(found.self_influence, it.dense.self_influence(it.train)) < 1e-10


def test_absolute_damping_is_lambda_itself():
    it = case("gpt2")
    dense = DenseScores(it.model, it.factors.modules, it.train, damping=0.3, relative=False)
    found = it.scores(damping=0.3, relative=False)
    assert relative(found.scores, dense.scores(it.queries, it.train)) < 1e-10
    assert set(found.damping.values()) == {0.3}


def test_huge_damping_leaves_the_plain_dot_product():
    it = case("llama_bias")
    found = it.scores(damping=1e9, relative=False)
    assert relative(found.scores * 1e9, plain_dot_product(it)) < 1e-6


@pytest.mark.parametrize("batch_tokens", [1, 13, 1000])
def test_batches_change_nothing(batch_tokens):
    it = case("gpt_neox")
    found = it.scores(batch_tokens=batch_tokens, per_token="all")
    assert relative(found.scores, it.expected) < 1e-10


@pytest.mark.parametrize("options", [{}, {"self_influence": True}, {"rank": 3}])
def test_blocks_of_queries_change_nothing(options):
    it = case("gpt2")
    whole = it.scores(per_token="top", per_layer=True, **options)
    parted = it.scores(per_token="top", per_layer=True, query_memory_gb=1e-9, **options)
    assert (whole.num_scans, parted.num_scans) == (1, NUM_QUERIES)
    assert relative(parted.scores, whole.scores) < 1e-10
    assert relative(parted.layer_scores, whole.layer_scores) < 1e-10
    one, other = by_pair(parted.details), by_pair(whole.details)
    assert one.keys() == other.keys()
    for pair in one:
        assert relative(one[pair][0], other[pair][0]) < 1e-9
        assert relative(one[pair][1], other[pair][1]) < 1e-9


def by_pair(details):
    """{(row, column): (module scores, position scores)}."""
    return {
        (row, column): (
            details.module_scores[k],
            details.token_scores[details.offsets[k] : details.offsets[k + 1]],
        )
        for k, (row, column) in enumerate(
            zip(details.rows.tolist(), details.columns.tolist(), strict=True)
        )
    }


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", [{}, {"self_influence": True}, {"rank": 13}])
def test_scores_are_the_dense_ones_on_every_path(path, options, monkeypatch):
    """Of tiles that hold some rows of one or two gradients, in batches of unequal lengths."""
    for family in ("gpt2", "llama_bias"):
        it = case(family)
        train = [*it.train, *(one_label(example) for example in it.train[:3])]
        dense = it.dense.per_module(it.queries, train)
        for number, tile in ((1, 1000), (3, 700), (8, 900), (40, 2**22)):
            force_path(monkeypatch, path, tile)
            some = [k % NUM_QUERIES for k in range(number)]
            queries = [it.queries[k] for k in some]
            found = influence_scores(
                it.model, it.factors, queries, train, batch_tokens=40, per_module=True, **options
            )
            assert relative(found.module_scores, dense[some]) < 1e-10, (family, number)
            assert relative(found.scores, dense[some].sum(1)) < 1e-10, (family, number)
            if options.get("self_influence"):
                assert relative(found.self_influence, it.dense.self_influence(train)) < 1e-10


def one_label(example):
    """The example's first two tokens: one counted position."""
    ids = example["input_ids"][:2]
    return {"input_ids": ids, "labels": torch.tensor([-100, int(ids[1])])}


# -- linearity and sums ----------------------------------------------------------------------------


def test_a_group_of_queries_is_the_sum_of_its_members():
    it = case("llama")
    grouped = [
        {**query, "group": group} if group else query
        for query, group in zip(it.queries, ["a", None, "b", "a", None], strict=True)
    ]
    options = {"batch_tokens": 10, "per_token": "top", "top_k": 2}
    found = influence_scores(it.model, it.factors, grouped, it.train, **options)
    expected = torch.stack(
        [it.expected[0] + it.expected[3], it.expected[1], it.expected[2], it.expected[4]]
    )
    assert relative(found.scores, expected) < 1e-10
    assert len(found.query_losses) == NUM_QUERIES


@pytest.mark.parametrize("rank", [None, 4])
def test_parts_sum_to_the_scores(rank):
    it = case("llama_bias")
    found = it.scores(rank=rank, per_module=True, per_layer=True, per_token="all", bottom_k=5)
    assert relative(found.module_scores.sum(1), found.scores) < 1e-10
    assert relative(found.layer_scores.sum(1), found.scores) < 1e-10
    starts = found.token_offsets
    for column in range(NUM_TRAIN):
        positions = found.token_scores[:, starts[column] : starts[column + 1]]
        assert relative(positions.sum(1), found.scores[:, column]) < 1e-9
    layer = [0, 0, 0, 1, 1, 1]
    assert found.layer_of.tolist() == layer
    assert relative(found.module_scores[:, 3:].sum(1), found.layer_scores[:, 1]) < 1e-10


def test_self_influence_is_the_diagonal_of_pairs():
    it = case("gpt2")
    found = influence_scores(
        it.model, it.factors, it.train, it.train, self_influence=True, batch_tokens=30
    )
    assert relative(found.self_influence, found.scores.diagonal()) < 1e-10
    assert (found.self_influence > 0).all()


def test_positions_are_those_of_dense_autograd():
    it = case("gpt2")
    found = it.scores(per_token="all")
    for query in range(2):
        for column in (0, 7):
            expected = it.dense.per_position(it.queries[query], it.train[column])
            start = found.token_offsets[column]
            positions = found.token_scores[query, start : start + len(expected)]
            assert relative(positions, expected) < 1e-10


@pytest.mark.parametrize("options", [{}, {"normalize": "cosine"}, {"rank": 12}])
def test_details_of_listed_sequences_sum_to_their_scores(options):
    it = case("llama_bias")
    found = it.scores(per_token="top", top_k=4, bottom_k=2, **options)
    details = found.details
    listed = {
        (row, column)
        for row in range(NUM_QUERIES)
        for end in (found.top[row], found.bottom[row])
        for column in end.columns.tolist()
    }
    assert set(zip(details.rows.tolist(), details.columns.tolist(), strict=True)) == listed
    for pair, (row, column) in enumerate(zip(details.rows, details.columns, strict=True)):
        part = slice(details.offsets[pair], details.offsets[pair + 1])
        score = found.scores[row, column]
        assert details.token_scores[part].sum().item() == pytest.approx(score.item(), rel=1e-9)
        assert details.module_scores[pair].sum().item() == pytest.approx(score.item(), rel=1e-9)
        by_layer = details.layer_token_scores[:, part].sum(1)
        by_module = details.module_scores[pair].view(2, -1).sum(1)  # two layers
        assert relative(by_layer, by_module) < 1e-9


# -- normalisation ---------------------------------------------------------------------------------


def test_normalisations_divide_by_the_dense_norms():
    it = case("gpt_neox")
    own_z = it.dense.self_influence(it.train)
    own_q = it.dense.self_influence(it.queries)
    expected = {
        "cosine": it.expected / (own_q[:, None] * own_z).sqrt(),
        "relatif_l": it.expected / own_z.sqrt(),
        "relatif_theta": it.expected / it.dense.theta_norms(it.train),
    }
    for normalize, scores in expected.items():
        found = it.scores(normalize=normalize, query_memory_gb=1e-5, training_size=50)
        assert relative(found.scores, scores) < 1e-10, normalize
        assert relative(found.nats * 50, it.expected) < 1e-10, normalize
    assert expected["cosine"].abs().max() <= 1


def test_the_cosine_of_a_sequence_with_itself_is_one():
    it = case("llama")
    found = influence_scores(it.model, it.factors, it.train, it.train, normalize="cosine")
    assert torch.allclose(found.scores.diagonal(), torch.ones(NUM_TRAIN).double(), atol=1e-10)


# -- low rank --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"per_token": "all"}, {"normalize": "cosine"}])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_full_rank_changes_nothing(family, options):
    it = case(family)
    whole, full = it.scores(**options), it.scores(rank=12 if family == "llama" else 13, **options)
    assert relative(full.scores, whole.scores) < 1e-10
    assert max(full.ranks.values()) == (12 if family == "llama" else 13)


def test_a_rank_above_the_matrixs_is_reduced():
    it = case("gpt2")
    found = it.scores(rank=99)
    assert relative(found.scores, it.expected) < 1e-10
    assert {name.rpartition(".")[2]: rank for name, rank in found.ranks.items()} == {
        "c_fc": 13,
        "c_proj": 12,
    }


@pytest.mark.parametrize("per_token", ["all", "none"])
def test_the_error_falls_with_the_rank_on_average(per_token):
    errors = np.mean(
        [
            [
                relative(case(f).scores(rank=r, per_token=per_token).scores, case(f).expected)
                for r in (1, 2, 4, 8, 12)
            ]
            for f in KINDS
        ],
        axis=0,
    )
    assert (np.diff(errors) < 0).all()
    assert errors[0] > 0.05


def test_two_stages_end_with_exact_scores():
    it = case("llama")
    found = it.scores(rank=1, rescore=4, top_k=3, bottom_k=2, per_token="top")
    assert relative(found.scores, it.expected) > 0.01  # the scan's
    spread = {0, 4, 9, 13}  # of 14, evenly
    for row, rescored in enumerate(found.rescored):
        by_scan = found.scores[row].argsort().tolist()
        candidates = set(by_scan[:4]) | set(by_scan[-4:])
        assert set(rescored.columns.tolist()) == candidates | spread
        exact = it.expected[row][torch.from_numpy(rescored.columns)]
        assert relative(rescored.exact_scores, exact) < 1e-10
        assert torch.equal(rescored.scan_scores, found.scores[row][rescored.columns])
        order = exact.argsort(descending=True)
        assert found.top[row].columns.tolist() == rescored.columns[order[:3].numpy()].tolist()
        assert found.bottom[row].columns.tolist() == (
            rescored.columns[order.flip(0)[:2].numpy()].tolist()
        )
        scan_top = set(rescored.columns[rescored.scan_scores.argsort(descending=True)[:3].numpy()])
        scan_bottom = set(rescored.columns[rescored.scan_scores.argsort()[:2].numpy()])
        kept = len(scan_top & set(found.top[row].columns)) + len(
            scan_bottom & set(found.bottom[row].columns)
        )
        assert rescored.overlap == pytest.approx(kept / 5)
        for expected, some in (
            (rescored.spearman, spread),
            (rescored.spearman_top, set(by_scan[-4:])),
        ):
            among = np.isin(rescored.columns, sorted(some))
            ranks = [x[among].argsort().argsort() for x in (exact, rescored.scan_scores)]
            correlation = torch.corrcoef(torch.stack(ranks).double())[0, 1].item()
            assert expected == pytest.approx(correlation)
    assert len(found.details.rows) == sum(
        len(set(t.columns) | set(b.columns)) for t, b in zip(found.top, found.bottom, strict=True)
    )


def test_no_overlap_is_told_where_it_could_only_be_whole():
    it = case("gpt2")
    found = it.scores(rank=1, rescore=3, top_k=3, bottom_k=0)
    assert {row.overlap for row in found.rescored} == {None}
    assert all(len(end.columns) == 0 for end in found.bottom)


def test_two_stages_over_everything_are_the_exact_answer():
    it = case("gpt2")
    options = {"top_k": 5, "per_token": "top", "normalize": "relatif_l"}
    exact = it.scores(**options)
    found = it.scores(rank=2, rescore=NUM_TRAIN, query_memory_gb=1e-9, **options)
    for one, other in ((found.top, exact.top), (found.bottom, exact.bottom)):
        for a, b in zip(one, other, strict=True):
            assert a.columns.tolist() == b.columns.tolist()
            assert relative(a.scores, b.scores) < 1e-10


# -- which sequences -------------------------------------------------------------------------------


def test_candidates_are_scored_alone_in_data_order():
    it = case("llama")
    found = it.scores(candidates=[9, 2, 5], top_k=2, self_influence=True)
    assert found.indices.tolist() == [2, 5, 9]
    for end in found.top:
        assert end.indices.tolist() == found.indices[end.columns].tolist()
    assert relative(found.scores, it.expected[:, [2, 5, 9]]) < 1e-10
    assert relative(found.shares, plain_shares(it.expected[:, [2, 5, 9]])) < 1e-10


def test_sequences_without_a_label_are_no_columns():
    it = case("llama")
    empty = {"input_ids": torch.tensor([3, 4]), "labels": torch.tensor([3, -100])}
    train = [it.train[0], empty, *it.train[1:4]]
    found = influence_scores(it.model, it.factors, it.queries, train)
    assert found.indices.tolist() == [0, 2, 3, 4]
    assert relative(found.scores, it.expected[:, :4]) < 1e-10


def test_lists_hold_the_ends_in_order():
    it = case("opt")
    found = it.scores(top_k=4, bottom_k=6)
    for row in range(NUM_QUERIES):
        order = it.expected[row].argsort(descending=True).tolist()
        assert found.top[row].columns.tolist() == order[:4]
        assert found.bottom[row].columns.tolist() == order[::-1][:6]
        assert torch.equal(found.top[row].scores, found.scores[row][found.top[row].columns])


def test_nats_are_scores_over_the_training_size_and_none_without_it():
    it = case("llama")
    assert it.scores().nats is None
    found = it.scores(training_size=1000)
    assert relative(found.nats, it.expected / 1000) < 1e-10
    end = found.top[0]
    assert relative(found.in_nats(end.scores, 0, end.columns), end.scores / 1000) < 1e-10


def plain_shares(scores):
    """Each score over the sum of those of its row with its sign, in a loop."""
    shares = torch.zeros_like(scores)
    for row, some in enumerate(scores.tolist()):
        for column, score in enumerate(some):
            sums = sum(abs(other) for other in some if (other > 0) == (score > 0))
            shares[row, column] = score / sums
    return shares


@pytest.mark.parametrize("normalize", ["none", "cosine"])
def test_shares_are_plain_sums_of_the_rows_scores_of_one_sign(normalize):
    it = case("gpt_neox")
    found = it.scores(normalize=normalize, query_memory_gb=1e-5)
    expected = it.expected
    if normalize == "cosine":
        own = [it.dense.self_influence(some) for some in (it.queries, it.train)]
        expected = expected / (own[0][:, None] * own[1]).sqrt()
    assert found.shares.dtype == torch.float64
    assert relative(found.shares, plain_shares(expected)) < 1e-10
    for row, (top, bottom) in enumerate(zip(found.top, found.bottom, strict=True)):
        for end in (top, bottom):
            listed = plain_shares(expected)[row, torch.from_numpy(end.columns)]
            assert relative(found.in_shares(end.scores, row), listed) < 1e-10


def test_shares_and_losses_of_a_group_are_of_its_sum():
    it = case("llama")
    groups = ["a", None, None, "a", None]
    grouped = [
        {**query, "group": group} if group else query
        for query, group in zip(it.queries, groups, strict=True)
    ]
    found = influence_scores(it.model, it.factors, grouped, it.train, batch_tokens=25)
    summed = it.expected[0] + it.expected[3]
    assert relative(found.shares[0], plain_shares(summed[None])[0]) < 1e-10
    alone = it.scores().query_losses
    assert found.losses == pytest.approx([alone[0] + alone[3], alone[1], alone[2], alone[4]])


def test_shares_of_exact_scores_are_of_the_scans_sums():
    it = case("llama")
    found = it.scores(rank=1, rescore=4, top_k=3, bottom_k=2)
    for row in range(NUM_QUERIES):
        scan = found.scores[row].tolist()
        for end in (found.top[row], found.bottom[row]):
            for share, column in zip(
                found.in_shares(end.scores, row).tolist(), end.columns.tolist(), strict=True
            ):
                exact = it.expected[row, column].item()
                sums = sum(abs(score) for score in scan if (score > 0) == (exact > 0))
                assert share == pytest.approx(exact / sums, rel=1e-9)


def test_a_share_of_nothing_is_none_and_that_of_a_zero_is_zero():
    found = case("gpt2").scores()
    found.scores = torch.tensor([[0.0, 2.0, 6.0], [-1.0, -3.0, 0.0], [0.0, 0.0, 0.0]])
    assert found.shares.tolist() == [[0, 0.25, 0.75], [-0.25, -0.75, 0], [0, 0, 0]]
    exact = found.in_shares(torch.tensor([-1.0, 4.0, 0.0]), 0)  # the scan saw no negative score
    assert exact[1:].tolist() == [0.5, 0]
    assert exact[0].isnan()


def test_query_losses_are_those_of_the_model():
    it = case("llama_bias")
    found = it.scores()
    for query, loss in zip(it.queries, found.query_losses, strict=True):
        with torch.no_grad():
            logits = it.model(input_ids=query["input_ids"][None]).logits[0, :-1]
        nats = torch.nn.functional.cross_entropy(logits, query["labels"][1:], reduction="sum")
        assert loss == pytest.approx(nats.item(), rel=1e-9)


# -- what is left as it was ------------------------------------------------------------------------


def test_the_model_comes_back_as_it_was():
    it = case("gpt2")
    it.model.train()
    for parameter in it.model.parameters():
        parameter.requires_grad_(True)
    before = {name: p.clone() for name, p in it.model.state_dict().items()}
    it.scores(per_token="all")
    assert all(parameter.requires_grad for parameter in it.model.parameters())
    assert it.model.training
    it.model.eval()
    assert all(torch.equal(before[name], p) for name, p in it.model.state_dict().items())
    assert not any(module._forward_hooks for module in it.model.modules())


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("where", ["query", "train"])
def test_nan_is_told_with_the_module_and_where_it_came_from(rank, where):
    model = build("llama")
    train, queries = examples(6, seed=1), examples(2, seed=2)
    factors = estimate_factors(model, train)
    marked = {"input_ids": torch.tensor([3, 28, 5, 4])}
    for example in [*train, *queries]:
        example["input_ids"][example["input_ids"] == 28] = 7
        example["labels"] = example["input_ids"]
    with torch.no_grad():
        model.model.embed_tokens.weight[28] = float("nan")
    (queries if where == "query" else train)[1] = marked
    said = "query 1" if where == "query" else "sequence 1 of the data"
    ask = {"rank": rank, "allow_changes": True}
    with (
        pytest.warns(UserWarning, match="embed_tokens"),
        pytest.raises(NonFiniteError, match=rf"input of module .*layers\.0\.mlp.*at {said}"),
    ):
        influence_scores(model, factors, queries, train, **ask)
