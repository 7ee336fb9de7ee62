"""Models whose attention reaches less far than some sequences are long, against dense autograd.

Of the plan of the whole data only sequences shorter than the window share a batch with others of
another length; of parts of the data, resumed or scored again, longer ones do too.
"""

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.dense import dense_E, dense_influence, relative
from helpers.dense_families import dense_of
from helpers.families import tiny_model
from helpers.workshop import run_workers

from ekfac_dist import estimate_factors, influence_scores, load_factors
from ekfac_dist.errors import Preempted
from ekfac_dist.fit import start as run
from ekfac_dist.passes import one_pass as passes

WINDOW = 8
WINDOWED = {
    "Llama4ForCausalLM": {"attention_chunk_size": WINDOW},
    "Qwen2MoeForCausalLM": {
        "sliding_window": WINDOW,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention"] * 2,
    },
    "PhimoeForCausalLM": {"sliding_window": WINDOW},
    "DogeForCausalLM": {"keep_window_size": WINDOW},
    "MistralForCausalLM": {"sliding_window": WINDOW},
    "Gemma3ForCausalLM": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
LENGTHS = (21, 4, 7, 21, 5, 21, 7, 5, 21, 6)
BUDGET = 42  # [21 21] [21 21] [7 7 6 5 5 4]
IN_BATCHES = 1e-6  # some families compute parts in float32
FIT = {"labels": "data", "accumulate": "float64", "batch_tokens": BUDGET}


def sequences(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(1, 29, (n + 1,), generator=generator) for n in lengths]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in tokens]


@functools.cache
def case(family):
    """A model, data, queries, its factors, and what plain autograd says of each module."""
    model = tiny_model(family, **WINDOWED[family])
    data, queries = sequences(LENGTHS, 0), sequences((21, 6), 1)
    factors = estimate_factors(model, data, **FIT)
    dense = {name: m for name, m in dense_of(model, factors, data).items() if m.M}
    of_queries = dense_of(model, factors, queries)
    scores = dense_influence({n: dense[n] for n in factors.modules}, of_queries)
    return SimpleNamespace(
        model=model, data=data, queries=queries, factors=factors, dense=dense, scores=scores
    )


def assert_dense(factors, dense):
    for name in factors.modules:
        assert relative(dense_E(factors, name), dense[name].E()) < IN_BATCHES


@pytest.mark.parametrize("family", WINDOWED)
def test_the_window_is_shorter_than_some_sequences(family):
    it = case(family)
    wide = {n: 64 if value == WINDOW else value for n, value in WINDOWED[family].items()}
    reaching = tiny_model(family, **wide)
    ids = it.data[0]["input_ids"][None]
    near, far = (logits(model, ids) for model in (it.model, reaching))
    assert relative(near[: WINDOW - 1], far[: WINDOW - 1]) < IN_BATCHES
    assert relative(near[WINDOW + 1 :], far[WINDOW + 1 :]) > 1e-3


def logits(model, ids):
    before = model.config._experts_implementation
    model.set_experts_implementation("eager")
    try:
        return model(input_ids=ids, use_cache=False).logits[0]
    finally:
        model.set_experts_implementation(before)


@pytest.mark.parametrize("family", WINDOWED)
def test_factors_are_as_dense_autograd_has_them(family):
    assert_dense(case(family).factors, case(family).dense)


@pytest.mark.parametrize("family", WINDOWED)
def test_a_run_that_goes_on_in_other_batches_has_the_same_factors(family, tmp_path, monkeypatch):
    it, steps = case(family), []
    with monkeypatch.context() as patch:
        patch.setattr(passes.preemption, "requested", lambda: steps.append(1) or True)
        with pytest.raises(Preempted):
            estimate_factors(it.model, it.data, output=tmp_path / "store", save_minutes=0, **FIT)
    assert len(steps) == 1
    # Another number of threads makes other steps of the same budget.
    monkeypatch.setattr(run, "step_tokens", lambda *_: 2 * BUDGET)
    again = estimate_factors(it.model, it.data, output=tmp_path / "store", save_minutes=0, **FIT)
    assert_dense(again, it.dense)


@pytest.mark.parametrize("family", WINDOWED)
def test_scores_details_and_scores_made_again_are_the_dense_ones(family):
    it = case(family)
    ask = functools.partial(
        influence_scores, it.model, it.factors, it.queries, it.data, batch_tokens=BUDGET
    )
    for k in (1, 3, 4):  # lists of several lengths are run again in batches of their own
        scanned = ask(top_k=k, bottom_k=k - 1, per_token="top")
        assert relative(scanned.scores, it.scores) < IN_BATCHES
        details = scanned.details
        expected = it.scores[details.rows, details.columns]
        assert relative(details.module_scores.sum(1), expected) < IN_BATCHES
        by_position = torch.stack([x.sum() for x in details.token_scores.split(lengths(details))])
        assert relative(by_position, expected) < IN_BATCHES
    for k in (2, 3):
        again = ask(rank=2, rescore=k, top_k=2, bottom_k=2, per_token="top")
        for row, rescored in enumerate(again.rescored):
            assert relative(rescored.exact_scores, it.scores[row, rescored.columns]) < IN_BATCHES


@pytest.mark.slow
def test_two_workers_find_the_same(tmp_path):
    done = run_workers(Path(__file__).with_name("worker_windows.py"), 2, tmp_path)
    assert done.returncode == 0, done.stderr
    for family in WINDOWED:
        it = case(family)
        assert_dense(load_factors(tmp_path / family, model=it.model), it.dense)
        scores, rows, columns, parts = torch.load(tmp_path / f"{family}.pt")
        assert relative(scores, it.scores) < IN_BATCHES
        assert relative(parts.sum(1), it.scores[rows, columns]) < IN_BATCHES


def lengths(details):
    return torch.as_tensor(details.offsets).diff().tolist()
