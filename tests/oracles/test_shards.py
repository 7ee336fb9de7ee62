"""Factors that are shared out among workers are those of one worker that holds them all."""

import functools
import json
from pathlib import Path

import pytest
from helpers.dense import counts_in, dense_E, relative
from helpers.halves import assert_same_halves
from helpers.networks import examples
from helpers.workshop import run_workers
from worker_shards import FITS, IN_ROUNDS, SETTINGS, WAITS, made

from ekfac_dist import estimate_factors, load_factors

HERE = Path(__file__).parent
# Workers, how many of them share one copy, and the fits.
RUNS = [
    (2, 2, tuple(FITS), ()),
    (4, 2, tuple(FITS), pytest.mark.slow),
    (3, 3, tuple(FITS), pytest.mark.slow),
    (4, 4, tuple(FITS), pytest.mark.slow),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same fits by one worker."""
    root = tmp_path_factory.mktemp("alone")
    for name, (_, number, settings) in FITS.items():
        data = examples(number, prompts=True)
        estimate_factors(made(name), data, output=root / name, **SETTINGS, **settings)
    return root


@pytest.fixture(scope="module")
def shared_out(tmp_path_factory):
    """Fits by several workers, by their number, how many share one copy, and the fits."""

    @functools.cache
    def of(workers, shard, fits):
        root = tmp_path_factory.mktemp("shared-out")
        arguments = [str(root), str(shard), *fits]
        done = run_workers(HERE / "worker_shards.py", workers, *arguments, timeout=500)
        assert done.returncode == 0, done.stderr
        return root

    return of


@pytest.mark.parametrize(
    ("workers", "shard", "fits", "fit"),
    [
        pytest.param(workers, shard, fits, fit, marks=marks, id=f"{shard} of {workers}-{fit}")
        for workers, shard, fits, marks in RUNS
        for fit in [*fits, *(f"in rounds/{name}" for name in IN_ROUNDS)]
    ],
)
def test_shared_out_factors_are_those_of_one_worker(alone, shared_out, workers, shard, fits, fit):
    whole = load_factors(alone / Path(fit).name)
    shards = load_factors(shared_out(workers, shard, fits) / fit)
    for key in ("num_sequences", "num_positions", "num_labels", "fingerprint"):
        assert shards.manifest["data"][key] == whole.manifest["data"][key]
    assert shards.manifest["modules"] == whole.manifest["modules"]
    assert set(shards.manifest["files"]) == set(whole.manifest["files"])
    assert_same_halves(shards, whole)
    for name, module in whole.modules.items():
        assert relative(dense_E(shards, name), dense_E(whole, name)) < 1e-12
        assert counts_in(shards, "covariance", module) == counts_in(whole, "covariance", module)


def test_workers_do_not_wait_for_each_other_at_the_end_of_a_step(shared_out):
    workers, shard, fits, _ = RUNS[0]
    few, many = json.loads((shared_out(workers, shard, fits) / WAITS).read_text())
    assert few == many
