"""1 to 4 real workers, which share out factors or not: the same answers, on each."""

from pathlib import Path

import pytest
import torch
from helpers.dense import relative
from helpers.dense_scores import DenseScores
from helpers.workshop import run_workers
from worker_scores import MESHES, MODELS, asked, file_of, made, task

from ekfac_dist import estimate_factors, load_factors

HERE = Path(__file__).parent
PLACES = [(workers, *mesh) for workers in MESHES for mesh in MESHES[workers] if workers > 1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Factors, and the answers that each of 1, 2, 3 and 4 workers got with them."""
    root = tmp_path_factory.mktemp("answers")
    for name, (_, _, modules) in MODELS.items():
        train = asked("biased" if name == "one query, one sequence" else name)[1]
        settings = {"labels": "data", "accumulate": "float64", "task": task(name)}
        estimate_factors(made(name), train, modules=modules, output=root / name, **settings)
    for workers in MESHES:
        done = run_workers(HERE / "worker_scores.py", workers, root, timeout=200)
        assert done.returncode == 0, done.stderr
    return root


def answers(root, name, workers=1, rank=0, mesh=(1, False)):
    return torch.load(file_of(root, name, workers, rank, mesh), weights_only=False)


@pytest.mark.parametrize(("workers", "shard", "is_sharded"), PLACES)
@pytest.mark.parametrize("name", MODELS)
def test_any_number_of_workers_gives_the_same_answer(root, name, workers, shard, is_sharded):
    alone = answers(root, name)
    for rank in range(workers):
        of_rank = answers(root, name, workers, rank, (shard, is_sharded))
        for answer in MODELS[name][1]:
            found, wanted = of_rank[answer], alone[answer]
            assert found["top"] == wanted["top"]
            assert found["ranks"] == wanted["ranks"]
            assert found["damping"] == wanted["damping"]
            assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-12)
            if shard == 1:
                assert found["num_scans"] == wanted["num_scans"]
            for key in ("scores", "shares", "self_influence", "token_scores", "parts", "details"):
                assert (found[key] is None) == (wanted[key] is None)
                if wanted[key] is not None:
                    assert relative(found[key], wanted[key]) < 1e-10, key
            for one, other in zip(found["exact"], wanted["exact"], strict=True):
                assert relative(one, other) < 1e-10


@pytest.mark.parametrize(("workers", "shard", "is_sharded"), [(1, 1, False), *PLACES])
@pytest.mark.parametrize("name", ["biased", "dense", "conv1d"])
def test_workers_scores_are_the_dense_ones(root, name, workers, shard, is_sharded):
    queries, train = asked(name)
    expected = DenseScores(made(name), load_factors(root / name).modules, train)
    expected = expected.scores(queries, train)
    expected = torch.stack([expected[0], expected[1] + expected[3], expected[2]])
    found = answers(root, name, workers, 0, (shard, is_sharded))["exact"]["scores"]
    assert relative(found, expected) < 1e-10


@pytest.mark.parametrize(("workers", "shard"), [(2, 1), (2, 2), (3, 3), (4, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_a_worker_reads_the_factors_of_its_own_modules_alone(root, name, workers, shard):
    held = [answers(root, name, workers, rank, (shard, False))["held"] for rank in range(workers)]
    everything = sorted(load_factors(root / name).modules)
    for first in range(0, workers, shard):
        of_copy = held[first : first + shard]
        assert sorted(name for names in of_copy for name in names) == everything


def test_blocks_were_really_several(root):
    number = {shard: answers(root, "biased", 2, 0, (shard, False)) for shard in (1, 2)}
    assert number[1]["blocks"]["num_scans"] > number[2]["blocks"]["num_scans"] > 1


def test_workers_that_are_given_different_arguments_are_told(tmp_path):
    done = run_workers(HERE / "worker_arguments.py", 2, tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
