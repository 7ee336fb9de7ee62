"""1 to 4 real workers, which share out factors or not: the same answers, on each."""

import functools
from pathlib import Path

import pytest
import torch
import worker_scores
from helpers.dense import relative
from helpers.dense_scores import DenseScores
from helpers.workshop import run_workers
from worker_scores import MESHES, MODELS, answers_of, asked, file_of, made, task

from ekfac_dist import estimate_factors, load_factors

HERE = Path(__file__).parent


def runs(of=tuple(MODELS)):
    """The model, the workers, how many of them share a copy, and whether the model is sharded."""
    each = [
        pytest.param(name, workers, *mesh, marks=[pytest.mark.slow] * (workers > 2))
        for workers, meshes in MESHES.items()
        for mesh, names in meshes.items()
        for name in names
        if name in of
    ]
    return pytest.mark.parametrize(("name", "workers", "shard", "is_sharded"), each)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A directory with the factors of every model."""
    root = tmp_path_factory.mktemp("answers")
    for name, (_, _, modules) in MODELS.items():
        train = asked("biased" if name == "one query, one sequence" else name)[1]
        settings = {"labels": "data", "accumulate": "float64", "task": task(name)}
        estimate_factors(made(name), train, modules=modules, output=root / name, **settings)
    return root


@pytest.fixture(scope="module")
def alone(stores):
    """What a single worker answers for a model."""
    return functools.cache(lambda name: worker_scores.answers(stores, name, made(name)))


@pytest.fixture(scope="module")
def answers(stores):
    """What a worker of several, which are started once, has answered for a model."""

    @functools.cache
    def start(workers):
        done = run_workers(HERE / "worker_scores.py", workers, stores, timeout=200)
        assert done.returncode == 0, done.stderr

    def of(name, workers, rank, shard, is_sharded=False):
        start(workers)
        path = file_of(stores, name, workers, rank, (shard, is_sharded))
        return torch.load(path, weights_only=False)

    return of


@runs()
def test_any_number_of_workers_gives_the_same_answer(
    alone, answers, name, workers, shard, is_sharded
):
    for rank in range(workers):
        of_rank = answers(name, workers, rank, shard, is_sharded)
        for answer in answers_of(name, is_sharded):
            found, wanted = of_rank[answer], alone(name)[answer]
            # Second derivatives in some modules at a time, of norms that are computed in float32.
            tolerance = 1e-6 if answer == "outputs" else 1e-10
            assert found["top"] == wanted["top"]
            assert found["ranks"] == wanted["ranks"]
            assert found["damping"] == wanted["damping"]
            assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-12)
            if shard == 1:
                assert found["num_scans"] == wanted["num_scans"]
            tensors = "scores shares self_influence token_scores parts details residuals"
            for key in tensors.split():
                assert (found[key] is None) == (wanted[key] is None)
                if wanted[key] is not None:
                    assert relative(found[key], wanted[key]) < tolerance, (answer, key)
            for one, other in zip(found["exact"], wanted["exact"], strict=True):
                assert relative(one, other) < 1e-10


@runs(of=("biased", "dense", "conv1d"))
def test_workers_scores_are_the_dense_ones(
    alone, answers, stores, name, workers, shard, is_sharded
):
    queries, train = asked(name)
    dense = DenseScores(made(name), load_factors(stores / name).modules, train)
    rows = dense.scores([*queries, queries[2]["against"]], train)
    expected = torch.stack([rows[0], rows[1] + rows[3], rows[2] - rows[4]])
    for found in (alone(name), answers(name, workers, 0, shard, is_sharded)):
        assert relative(found["exact"]["scores"], expected) < 1e-10


@runs()
def test_a_worker_reads_the_factors_of_its_own_modules_alone(
    answers, stores, name, workers, shard, is_sharded
):
    held = [answers(name, workers, rank, shard, is_sharded)["held"] for rank in range(workers)]
    everything = sorted(load_factors(stores / name).modules)
    for first in range(0, workers, shard):
        of_copy = held[first : first + shard]
        assert sorted(module for modules in of_copy for module in modules) == everything


@pytest.mark.parametrize("shard", [1, 2])
def test_scores_of_losses_of_a_sharded_model_are_refused(answers, shard):
    told = answers("experts", 2, 0, shard, True)["refused"]
    assert "the model is sharded over the workers" in told
    assert "set scores.tokens: inputs" in told


def test_blocks_were_really_several(answers):
    number = {shard: answers("biased", 2, 0, shard)["blocks"]["num_scans"] for shard in (1, 2)}
    assert number[1] > number[2] > 1


def test_workers_that_are_given_different_arguments_are_told(tmp_path):
    done = run_workers(HERE / "worker_arguments.py", 2, tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
