"""Scores from an index against dense matrices and plain autograd."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.dense import relative
from helpers.dense_scores import DenseScores
from helpers.families import tiny_config
from helpers.workshop import (
    VOCABULARY,
    run_here,
    save_tiny,
    texts,
    tiny_gpt2_config,
    tiny_llama_config,
    write_jsonl,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from ekfac_dist import influence_scores, load_factors
from ekfac_dist.errors import ConfigError, StoreError

NUMBER, QUERIES, LONGEST = 14, 3, 30
FAMILIES = {"llama": tiny_llama_config, "gpt2": tiny_gpt2_config}  # Conv1D and biases
CONFIGS = {**FAMILIES, "mixtral": lambda: tiny_config(MixtralConfig, vocab_size=VOCABULARY)}


@dataclass
class Case:
    """A model and its factors on the disk, with training sequences and queries."""

    root: Path
    model: torch.nn.Module
    train: list
    queries: list

    @property
    def factors(self):
        return load_factors(self.root / "factors")

    def index(self, rank=LONGEST, dtype="float64", data="text.jsonl", name=None, *more):
        output = self.root / (name or f"index-{rank}-{dtype}")
        if not output.exists() or more:
            done = run_here(
                [
                    *("index", "--factors", self.root / "factors", "--output", output),
                    *("--index.rank", rank, "--index.dtype", dtype, "--batch_tokens", 50),
                    *("--data.source", self.root / data, "--data.max_tokens", LONGEST, *more),
                ]
            )
            assert done.returncode == 0, done.stderr
        return output

    def scores(self, index=None, train=None, **options):
        options = {"batch_tokens": 60, "top_k": 3, **options}
        train = train or self.train
        return influence_scores(
            self.model, self.factors, self.queries, train, index=index, **options
        )

    @functools.cached_property
    def dense(self):
        return DenseScores(self.model, self.factors.modules, self.train)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    @functools.cache
    def made(family):
        root = tmp_path_factory.mktemp(family)
        save_tiny(root / "model", CONFIGS[family](), dtype=torch.float64)
        rows = texts(NUMBER + 4, seed=1)
        write_jsonl(root / "text.jsonl", [{"text": text} for text in rows[:NUMBER]])
        write_jsonl(root / "more.jsonl", [{"text": text} for text in rows])
        fit = run_here(
            [
                *("estimate", "--model.name", root / "model", "--data.source", root / "text.jsonl"),
                *("--model.dtype", "float64", "--data.max_tokens", LONGEST),
                *("--factors.labels", "data"),
                *("--factors.accumulate", "float64", "--output", root / "factors"),
            ]
        )
        assert fit.returncode == 0, fit.stderr
        model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float64).eval()
        tokenizer = AutoTokenizer.from_pretrained(root / "model")

        def examples(some):
            ids = tokenizer(some, truncation=True, max_length=LONGEST)["input_ids"]
            return [{"input_ids": torch.tensor(one), "labels": torch.tensor(one)} for one in ids]

        return Case(root, model, examples(rows[:NUMBER]), examples(texts(QUERIES, seed=2)))

    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_of_full_rank_it_scores_exactly(case, family):
    it = case(family)
    expected = it.dense.per_module(it.queries, it.train)
    for damping in (0.1, 3.0):
        dense = DenseScores(it.model, it.factors.modules, it.train, damping=damping)
        found = it.scores(it.index(), damping=damping, rescore=0, per_module=True)
        assert relative(found.scores, dense.scores(it.queries, it.train)) < 1e-10
    found = it.scores(it.index(), rescore=0, per_module=True, per_layer=True)
    assert relative(found.module_scores, expected) < 1e-10
    assert relative(found.layer_scores.sum(1), expected.sum(1)) < 1e-10
    rounded = it.scores(it.index(dtype="float32"), rescore=0)
    assert relative(rounded.scores, expected.sum(1)) < 1e-6


def test_of_experts_it_is_what_a_scan_is(case):
    it = case("mixtral")  # a scan of experts is held against dense matrices elsewhere
    options = {"self_influence": True, "per_module": True}
    expected = it.scores(**options)
    found = it.scores(it.index(), rescore=0, **options)
    assert relative(found.module_scores, expected.module_scores) < 1e-10
    assert relative(found.self_influence, expected.self_influence) < 1e-5
    again = it.scores(it.index(1), rescore=NUMBER)
    assert (
        relative(
            torch.stack([one.scores for one in again.top]),
            torch.stack([one.scores for one in expected.top]),
        )
        < 1e-9
    )


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_error_falls_with_the_rank(case, family):
    it = case(family)
    expected = it.scores().scores
    errors = [
        float(relative(it.scores(it.index(rank), rescore=0).scores, expected))
        for rank in (1, 2, 4, 8, LONGEST)
    ]
    assert errors == sorted(errors, reverse=True)
    assert 0.02 < errors[0] < 1
    assert errors[-1] < 1e-10


def test_what_it_keeps_in_16_bits_is_close(case):
    it = case("gpt2")
    expected = it.dense.scores(it.queries, it.train)
    assert relative(it.scores(it.index(dtype="bfloat16"), rescore=0).scores, expected) < 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_of_whole_gradients(case, family):
    it, index = case(family), case(family).index(1)
    for damping in (0.1, 1.0, 10.0):  # those that are stored
        dense = DenseScores(it.model, it.factors.modules, it.train, damping=damping)
        found = it.scores(
            index, damping=damping, rescore=0, self_influence=True, normalize="relatif_theta"
        )
        assert relative(found.self_influence, dense.self_influence(it.train)) < 1e-5
        assert relative(found.norms, dense.theta_norms(it.train)) < 1e-5
    dense = DenseScores(it.model, it.factors.modules, it.train, damping=0.03)  # between them
    found = it.scores(
        index, damping=0.03, rescore=0, self_influence=True, normalize="relatif_theta"
    )
    assert relative(found.self_influence, dense.self_influence(it.train)) < 0.03
    assert relative(found.norms, dense.theta_norms(it.train)) < 0.03


def test_cosines_of_a_full_rank_are_exact(case):
    it = case("llama")
    found = it.scores(it.index(), rescore=0, normalize="cosine")
    assert relative(found.scores, it.scores(normalize="cosine").scores) < 1e-6


def test_what_is_scored_again_is_exact(case):
    it = case("gpt2")
    expected = it.dense.scores(it.queries, it.train)
    found = it.scores(it.index(1), rescore=NUMBER, per_token="top")
    for row in range(QUERIES):
        order = torch.argsort(expected[row], descending=True)[:3]
        assert found.top[row].columns.tolist() == order.tolist()
        assert relative(found.top[row].scores, expected[row][order]) < 1e-10
        assert relative(found.rescored[row].exact_scores, expected[row]) < 1e-10
    details = found.details
    sums = torch.stack(
        [
            details.token_scores[a:b].sum()
            for a, b in zip(details.offsets, details.offsets[1:], strict=False)
        ]
    )
    assert relative(sums, expected[details.rows, details.columns]) < 1e-10


@pytest.mark.parametrize("options", [{"query_memory_gb": 1e-9}, {"rank": 16}])
def test_blocks_and_low_rank_queries_of_full_rank_change_nothing(case, options):
    it = case("gpt2")
    found = it.scores(it.index(), rescore=0, **options)
    assert relative(found.scores, it.dense.scores(it.queries, it.train)) < 1e-9


def test_refined_queries_and_contrasts_are_scored_from_it_too(case):
    it = case("llama")
    refine = {"method": "cg", "sequences": NUMBER, "iterations": 3}
    exact = it.scores(refine=refine).scores
    assert relative(it.scores(it.index(), refine=refine, rescore=0).scores, exact) < 1e-9
    one, other, _ = it.queries
    it = Case(it.root, it.model, it.train, [{**one, "against": other}])
    expected = it.dense.scores([one], it.train) - it.dense.scores([other], it.train)
    assert relative(it.scores(it.index(), rescore=0).scores, expected) < 1e-10


def test_candidates_are_scored_alone(case):
    it = case("gpt2")
    expected = it.dense.scores(it.queries, it.train)
    found = it.scores(it.index(), rescore=0, candidates=[3, 4, 11])
    assert found.indices.tolist() == [3, 4, 11]
    assert relative(found.scores, expected[:, [3, 4, 11]]) < 1e-10


# Products of low rank come from iterations that start by the batch, so they end not quite alike.
@pytest.mark.parametrize(("rank", "tolerance"), [(LONGEST, 1e-10), (2, 1e-5)])
def test_added_sequences_are_those_of_an_index_made_at_once(case, rank, tolerance):
    it = case("llama")
    name = f"grown-{rank}"
    output = it.index(rank, "float64", "text.jsonl", name)
    before = {path.name: path.read_bytes() for path in output.glob("shard-*")}
    it.index(rank, "float64", "more.jsonl", name, "--add")
    after = {path.name: path.read_bytes() for path in output.glob("shard-*")}
    assert {file: after[file] for file in before} == before
    assert len(after) == len(before) + 1  # of four sequences, less than two steps
    whole = it.index(rank, "float64", "more.jsonl", f"whole-{rank}")
    tokenizer = AutoTokenizer.from_pretrained(it.root / "model")
    rows = [{"text": text} for text in texts(NUMBER + 4, seed=1)]
    found = [
        influence_scores(
            *(it.model, it.factors, [{"text": "Some long text."}], rows),
            **{"tokenizer": tokenizer, "max_tokens": LONGEST, "index": index, "rescore": 0},
            top_k=3,
        ).scores
        for index in (output, whole)
    ]
    assert found[0].shape == (1, NUMBER + 4)
    assert relative(found[0], found[1]) < tolerance


def test_what_does_not_fit_is_refused(case):
    it, other = case("gpt2"), case("llama")
    with pytest.raises(StoreError, match="made with other factors"):
        it.scores(other.index())
    with pytest.raises(StoreError, match=r"made of other data \(\d+ sequences, \d+ positions\)"):
        it.scores(it.index(), train=it.train[:-1])
    with pytest.raises(ConfigError, match="an index keeps no positions"):
        it.scores(it.index(), per_token="all")
    with pytest.raises(ConfigError, match=r"rescore is 0"):
        it.scores(it.index(), per_token="top", rescore=0)
    with pytest.raises(ConfigError, match="knows norms of gradients for"):
        it.scores(it.index(), rescore=0, normalize="cosine", damping=1e4)
    with torch.no_grad():
        weight = next(it.model.parameters())
        kept = weight.clone()
        weight.add_(1e-3)
    try:
        with pytest.raises(StoreError, match="made with another model"):
            it.scores(it.index(), rescore=0, allow_changes=True)
    finally:
        weight.data.copy_(kept)


def test_indices_are_in_the_datas_order(case):
    it = case("gpt2")
    found = it.scores(it.index(1), rescore=0)
    assert np.array_equal(found.indices, np.arange(NUMBER))
