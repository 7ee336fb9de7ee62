"""1, 2 and 3 real workers, whatever number fitted the factors: the same answers, on each."""

from pathlib import Path

import pytest
import torch
from helpers.dense import relative
from helpers.dense_scores import DenseScores
from helpers.networks import build, examples
from helpers.workshop import run_workers
from worker_scores import ANSWERS, FAMILIES

from ekfac_dist import estimate_factors, load_factors

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Factors, and the answers that each of 1, 2 and 3 workers got with them."""
    root = tmp_path_factory.mktemp("answers")
    train = examples(11, seed=1, prompts=True)
    for family in FAMILIES:
        estimate_factors(
            build(family), train, labels="data", accumulate="float64", output=root / family
        )
    for workers in (1, 2, 3):
        done = run_workers(HERE / "worker_scores.py", workers, root, timeout=120)
        assert done.returncode == 0, done.stderr
    return root


def answers(root, workers, rank=0, family=FAMILIES[0]):
    return torch.load(root / f"{family}-{workers}-{rank}.pt", weights_only=False)


@pytest.mark.parametrize("answer", ANSWERS)
def test_any_number_of_workers_gives_the_same_answer(root, answer):
    alone = answers(root, 1)[answer]
    for workers in (2, 3):
        for rank in range(workers):
            found = answers(root, workers, rank)[answer]
            assert found["top"] == alone["top"]
            assert found["num_scans"] == alone["num_scans"]
            assert found["losses"] == pytest.approx(alone["losses"], rel=1e-12)
            for key in ("scores", "shares", "self_influence", "token_scores", "parts", "details"):
                assert (found[key] is None) == (alone[key] is None)
                if alone[key] is not None:
                    assert relative(found[key], alone[key]) < 1e-10, key
            for one, other in zip(found["exact"], alone["exact"], strict=True):
                assert relative(one, other) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_scores_are_the_dense_ones(root, family, workers):
    model, train = build(family), examples(11, seed=1, prompts=True)
    queries = examples(4, seed=2, prompts=True)
    names = load_factors(root / family).modules
    expected = DenseScores(model, names, train).scores(queries, train)
    expected = torch.stack([expected[0], expected[1] + expected[3], expected[2]])
    found = answers(root, workers, family=family)["exact"]["scores"]
    assert relative(found, expected) < 1e-10


def test_blocks_were_really_several(root):
    assert answers(root, 2)["blocks"]["num_scans"] > 1


def test_workers_that_are_given_different_arguments_are_told(tmp_path):
    done = run_workers(HERE / "worker_arguments.py", 2, tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
