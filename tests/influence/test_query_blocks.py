"""Blocks of query groups: as many together as fit, whatever workers share them and are saved."""

from types import SimpleNamespace

import pytest
import torch
from helpers.networks import build, examples

from ekfac_dist import estimate_factors, influence_scores
from ekfac_dist.config import RefineConfig, ScoresConfig
from ekfac_dist.curvature import costs
from ekfac_dist.errors import ConfigError
from ekfac_dist.influence.blocks import choose_shard, plan_blocks, refined_at_a_time
from ekfac_dist.influence.preconditioned import bytes_per_group
from ekfac_dist.models.capture.hooks import Capture
from ekfac_dist.models.find.discovery import discover
from ekfac_dist.passes.owners import require_divisor

DOUBLE = torch.float64


@pytest.fixture(scope="module")
def modules():
    """Two layers, each of a gate and an up projection 8 → 12 and a down projection 12 → 8."""
    return discover(build("llama_bias"), None, torch.device("cpu")).modules


def budget(num_bytes, **options):
    return ScoresConfig(query_memory_gb=num_bytes / 1e9, **options)


def made_context(modules, shard=1, method="none"):
    refine = RefineConfig(method=method)
    return SimpleNamespace(modules=modules, dtype=DOUBLE, shard=shard, refine=refine)


def plan(modules, num_groups, config, saved=(), shard=1, method="none"):
    return plan_blocks(num_groups, made_context(modules, shard, method), config, saved)


def pieces(blocks):
    return [name for block in blocks for name in (block.scan, *block.following)]


def test_a_row_takes_what_the_worker_that_holds_most_of_it_holds(modules):
    sizes = [(m.num_outputs, m.input_size) for m in modules]
    whole = 8 * sum(o * i for o, i in sizes)
    assert bytes_per_group(modules, None, DOUBLE) == whole
    assert bytes_per_group(modules, 1, DOUBLE) == 8 * sum(o + i for o, i in sizes)
    assert bytes_per_group(modules, 99, DOUBLE) == 8 * sum(min(o, i) * (o + i) for o, i in sizes)
    # Of four families two have a gate and an up projection: with three owners these are alone.
    pair = 8 * sum(o * i for o, i in sizes[:2])
    assert bytes_per_group(modules, None, DOUBLE, 2) == whole // 2
    assert bytes_per_group(modules, None, DOUBLE, 3) == pair
    assert bytes_per_group(modules, None, DOUBLE, 4) == pair


@pytest.mark.parametrize(
    ("rows", "workers", "shard"),
    [
        (10, 1, 1),
        (10, 6, 1),  # one copy holds all rows
        (11, 6, 2),
        (20, 6, 2),
        (21, 6, 3),
        (21, 4, 4),  # 3 does not divide 4
        (99, 6, 6),  # none does
    ],
)
def test_as_few_workers_share_a_copy_as_hold_all_rows_in_one_block(modules, rows, workers, shard):
    config = budget(10 * bytes_per_group(modules, None, DOUBLE))
    assert choose_shard(rows, modules, DOUBLE, workers, config) == shard


def test_a_shard_that_is_given_is_taken(modules):
    assert choose_shard(9, modules, DOUBLE, 6, budget(1, shard=1)) == 1
    assert choose_shard(9, modules, DOUBLE, 6, budget(1e9, shard=3)) == 3


def test_a_shard_that_cannot_be_is_refused_with_those_that_can():
    require_divisor("shard", "auto", 7)
    require_divisor("shard", 2, 4)
    with pytest.raises(ConfigError, match="is 6, which it does not divide; give 1, 2, 3, 6 or aut"):
        require_divisor("shard", 4, 6)
    with pytest.raises(ConfigError, match="is 4, which is less; give 1, 2, 4 or auto"):
        require_divisor("shard", 8, 4)


def test_blocks_hold_as_many_groups_as_fit(modules):
    config = budget(2 * bytes_per_group(modules, None, DOUBLE), per_token="none")
    assert [b.groups for b in plan(modules, 5, config)] == [[0, 1], [2, 3], [4]]
    assert [b.groups for b in plan(modules, 5, config, shard=2)] == [[0, 1, 2, 3], [4]]
    assert len(plan(modules, 3, budget(1))) == 3


def test_refined_gradients_share_the_budget_with_the_vectors_of_their_solve(modules):
    """A solve holds four vectors of each row; where these become low-rank ones, half is theirs."""
    whole = bytes_per_group(modules, None, DOUBLE)
    config = budget(8 * whole, per_token="none")
    assert [b.groups for b in plan(modules, 5, config, method="cg")] == [[0, 1], [2, 3], [4]]
    assert refined_at_a_time(made_context(modules, method="cg"), config, None) == 2
    config = budget(8 * whole, rank=1, per_token="none")
    assert refined_at_a_time(made_context(modules, method="cg"), config, 1) == 1
    at_a_time = int(4 * whole // bytes_per_group(modules, 1, DOUBLE))
    assert len(plan(modules, at_a_time + 1, config, method="cg")[0]) == at_a_time


def test_pieces_that_are_saved_stay_as_they_are_whatever_fits_now(modules):
    config = budget(2 * bytes_per_group(modules, None, DOUBLE))
    saved = {"scan-0-3", "details-0-3", "scan-4-7"}
    assert pieces(plan(modules, 10, config, saved)) == [
        *("scan-0-3", "details-0-3"),
        *("scan-4-7", "details-4-5", "details-6-7"),  # as many together as fit now
        *("scan-8-9", "details-8-9"),
    ]
    assert pieces(plan(modules, 10, config, saved, shard=2)) == [
        *("scan-0-3", "details-0-3", "scan-4-7", "details-4-7", "scan-8-9", "details-8-9"),
    ]


def test_groups_before_and_between_saved_pieces_are_planned(modules):
    """Pieces may be missing anywhere: damaged ones do not count as saved."""
    config = budget(2 * bytes_per_group(modules, None, DOUBLE))
    saved = {"scan-3-5", "details-6-9", "scan-8-8"}
    assert pieces(plan(modules, 10, config, saved)) == [
        *("scan-0-1", "details-0-1", "scan-2-2", "details-2-2"),
        *("scan-3-5", "details-3-4", "details-5-5", "scan-6-7", "details-6-7"),
        *("scan-8-8", "details-8-8", "scan-9-9", "details-9-9"),
    ]


def test_rescored_parts_that_are_saved_stay_too(modules):
    config = budget(2 * bytes_per_group(modules, None, DOUBLE), rank=1, rescore=5)
    (block,) = plan(modules, 6, config, {"scan-0-5", "rescore-1-3"})
    assert block.following == {
        "rescore-0-0": [0],
        "rescore-1-3": [1, 2, 3],
        "rescore-4-5": [4, 5],
    }


def test_steps_of_queries_are_as_small_as_a_cpu_favours(monkeypatch: pytest.MonkeyPatch):
    train, queries, ran = examples(12, seed=1), examples(5, seed=2), []
    longest = max(len(example["input_ids"]) for example in (*train, *queries))
    factors = estimate_factors(build("llama"), train)
    run = Capture.run
    monkeypatch.setattr(Capture, "run", lambda *of: ran.append(of[1].num_positions) or run(*of))
    monkeypatch.setattr(costs, "TOKENS_PER_THREAD", 2 * longest)
    whole = influence_scores(build("llama"), factors, queries, train, batch_tokens=9999)
    assert longest < max(ran) <= 2 * longest * torch.get_num_threads()
    few = influence_scores(build("llama"), factors, queries, train, batch_tokens=longest)
    assert torch.allclose(whole.scores, few.scores, rtol=1e-4)
