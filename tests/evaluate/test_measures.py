"""Rank correlations, ranks and intervals, against scipy and by hand."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from ekfac_dist.config import DataConfig, EvaluateConfig, ModelConfig
from ekfac_dist.evaluate import measures
from ekfac_dist.evaluate.methods import Row, rows_of
from ekfac_dist.evaluate.protocols import (
    Lds,
    chosen_rows,
    lds_results,
    most_positive,
    recall_result,
    removal_result,
)
from ekfac_dist.evaluate.subsets import lds_subsets

DRAW = np.random.default_rng(0)


def test_rank_correlations_are_those_of_scipy_with_ties():
    one, two = DRAW.integers(6, size=(40, 7)).astype(float), DRAW.standard_normal((40, 7))
    expected = [spearmanr(one[:, k], two[:, k]).statistic for k in range(7)]
    assert measures.spearman(one, two) == pytest.approx(expected, abs=1e-12)


def test_a_constant_side_has_no_correlation():
    assert measures.spearman(np.ones((5, 2)), DRAW.standard_normal((5, 2))).tolist() == [0, 0]


def test_predictions_are_sums_over_the_kept_sequences():
    scores, subsets = DRAW.standard_normal((3, 8)), DRAW.random((5, 8)) < 0.5
    found = measures.predictions(scores, subsets)
    for s, q in np.ndindex(5, 3):
        assert found[s, q] == pytest.approx(sum(scores[q, z] for z in range(8) if subsets[s, z]))


def rows():
    config = EvaluateConfig(
        model=ModelConfig(name="m"),
        data=DataConfig(source="d"),
        queries="q",
        output="o",
        dampings=[0.1, 1.0],
    )
    return {row.key: row for row in rows_of(config)}


@pytest.fixture(scope="module")
def lds():
    """Two seeds whose losses a linear predictor knows, up to the seed's own noise."""
    subsets = lds_subsets(60, 80, 0.5, 0)
    truth = DRAW.standard_normal((20, 60))
    exact = measures.predictions(truth, subsets)
    losses = [-(exact + 2 * DRAW.standard_normal(exact.shape)) for _ in range(2)]
    return Lds(subsets, losses, 200), truth, exact


def test_a_perfect_predictor_has_an_lds_of_1_and_a_random_one_of_0(lds):
    subsets, truth = lds[0].subsets_SN, lds[1]
    perfect = Lds(subsets, [-lds[2]], 200)
    good, bad = Row("scores", "good"), Row("random", "random")
    perfect.add(good, [truth])
    perfect.add(bad, [DRAW.standard_normal(truth.shape)])
    results, plain = lds_results(perfect, [good, bad])
    assert plain is None
    assert results[good.key]["lds"]["mean"] == pytest.approx(1)
    random = results[bad.key]["lds"]
    assert random["low"] < 0 < random["high"]
    assert random["high"] < 0.2


def test_the_ceiling_is_how_far_seeds_agree_and_a_perfect_predictor_has_its_root(lds):
    both, truth, _ = lds
    row = Row("scores", "truth")
    both.add(row, [truth, truth])
    ceiling = both.ceiling()
    assert ceiling.low < ceiling.mean < ceiling.high
    assert both.by_query(row.key).mean() == pytest.approx(ceiling.mean**0.5, abs=0.02)
    assert Lds(both.subsets_SN, both.losses[:1], 10).ceiling() is None


def test_rows_are_compared_with_plain_ekfac_at_its_best_damping(lds):
    subsets, truth = lds[0].subsets_SN, lds[1]
    both = Lds(subsets, lds[0].losses, 200)
    noisy = truth + 2 * DRAW.standard_normal(truth.shape)
    by_key = {
        "ekfac-0.1": noisy,
        "ekfac-1": truth,
        "kfac-0.1": noisy,
        "kfac-1": noisy + 3 * DRAW.standard_normal(truth.shape),
    }
    chosen = {key: row for key, row in rows().items() if key in by_key}
    for key, row in chosen.items():
        both.add(row, [by_key[key]] * 2)
    results, plain = lds_results(both, list(chosen.values()))
    assert plain == "ekfac-1"
    assert results["ekfac-1"]["over_plain"] == {"mean": 0, "low": 0, "high": 0}
    worse = results["ekfac-0.1"]["over_plain"]
    assert worse["high"] < 0
    assert worse["mean"] == pytest.approx(
        results["ekfac-0.1"]["lds"]["mean"] - results["ekfac-1"]["lds"]["mean"]
    )
    equal = results["kfac-0.1"]["over_equal"]  # the same scores as plain EK-FAC's there
    assert (equal["mean"], equal["low"], equal["high"]) == (0, 0, 0)
    assert results["kfac-1"]["over_equal"] == results["kfac-1"]["over_plain"]
    assert "over_equal" not in results["ekfac-0.1"]
    assert [row.key for row in chosen_rows(both, list(chosen.values()), 5)] == [
        "kfac-0.1",
        "ekfac-1",
    ]


def test_dampings_are_chosen_by_the_queries_that_are_not_left_out():
    subsets = lds_subsets(40, 60, 0.5, 0)
    truth = DRAW.standard_normal((10, 40))
    good_first, good_last = DRAW.standard_normal((2, 10, 40))
    good_first[:5], good_last[5:] = truth[:5], truth[5:]
    both = Lds(subsets, [-measures.predictions(truth, subsets)], 10)
    first, last = Row("ekfac", "EK-FAC", 0.1), Row("ekfac", "EK-FAC", 1.0)
    both.add(first, [good_first])
    both.add(last, [good_last])
    assert chosen_rows(both, [first, last], 5) == [last]


def test_ranks_of_gold_count_ties_against_it_and_other_gold_not_at_all():
    scores = np.array([[3.0, 5, 5, 1], [9, 9, 8, 7], [0, 0, 0, 0]])
    ranks = measures.gold_ranks(scores, [[0], [0, 1], [2]])
    assert ranks.tolist() == [3, 1, 4]


def test_recall_is_over_queries_with_gold_and_the_mean_of_seeds():
    first, second = np.zeros((3, 20)), np.zeros((3, 20))
    first[0, 4], first[2, 7] = 1, 1
    second[0, 4], second[2, :11] = 1, np.arange(11)  # the gold, of column 7, comes fourth
    result = recall_result([first, second], {0: [4], 2: [7]}, 50)
    assert result["num_queries"] == 2
    assert result["mrr"]["mean"] == pytest.approx((1 + (1 + 1 / 4) / 2) / 2)
    assert result["recall10"]["mean"] == 1


def test_removal_is_a_rise_over_random_removals():
    result = removal_result(np.array([[2.0, 3], [1, 1]]), np.ones((2, 2, 4)), 100)
    assert result["by_query"] == [1.5, 0]
    assert result["low"] <= result["mean"] == 0.75 <= result["high"]


def test_the_highest_scores_come_first_and_of_equal_ones_the_first():
    assert most_positive(np.array([[1.0, 3, 3, 2]]), 0, 3).tolist() == [1, 2, 3]
