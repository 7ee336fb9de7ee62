"""A fit that was ended goes on with other workers, or with factors shared out otherwise."""

import json
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest
import worker_layouts
from helpers.dense import counts_in, dense_E, relative
from helpers.halves import assert_same_halves
from helpers.killed_fits import content
from helpers.workshop import run_workers
from worker_layouts import FITS, NUM_EXAMPLES

from ekfac_dist import load_factors

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow

# Of each run the fit, and its starts: workers, shard, and after how many of a worker's steps in it
# SIGTERM comes.
Start = tuple[int, int, int | None]
RUNS: dict[str, tuple[str, list[Start]]] = {
    "2 of 2, experts": ("experts", [(2, 2, 3), (2, 2, 6), (2, 2, None)]),
    "2 of 2, then 1 of 2": ("dense", [(2, 2, 2), (2, 1, 5), (2, 1, None)]),
    "2 of 2, then 1 of 1": ("dense", [(2, 2, 2), (1, 1, None)]),
}
MORE_RUNS: dict[str, tuple[str, list[Start]]] = {
    "1 of 2, then 2 of 2": ("experts", [(2, 1, 1), (2, 2, 4), (2, 2, None)]),
    "2 of 2": ("dense", [(2, 2, 2), (2, 2, 5), (2, 2, None)]),
    "2 of 2, computed again": ("layers computed again", [(2, 2, 6), (2, 2, None)]),
    "2 of 2, then 1 of 1, in the refit": ("experts", [(2, 2, 7), (1, 1, None)]),
    "1 of 1, then 2 of 2": ("in blocks", [(1, 1, 3), (2, 2, 5), (1, 1, None)]),
    "2 of 4": ("dense", [(4, 2, 1), (4, 2, 3), (4, 2, None)]),
    "4 of 4, experts": ("experts", [(4, 4, 1), (4, 4, 3), (4, 4, None)]),
    "2 of 2, then 3 of 3": ("dense", [(2, 2, 2), (3, 3, None)]),
    "3 of 3, then 2 of 2": ("experts", [(3, 3, 2), (2, 2, 3), (2, 2, None)]),
    "2 of 4, then 2 of 2": ("in blocks", [(4, 2, 2), (2, 2, None)]),
    "4 of 4, then 2 of 4": ("dense", [(4, 4, 1), (4, 2, 3), (4, 2, None)]),
    "2 of 4, then 1 of 1": ("experts", [(4, 2, 1), (1, 1, None)]),
    "4, 3, 2, 1": ("experts", [(4, 2, 1), (3, 3, 1), (2, 2, 1), (1, 1, 1), (4, 4, None)]),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fits by one worker without interruption."""
    root = tmp_path_factory.mktemp("alone")
    for name in FITS:
        worker_layouts.fit(root / name, name, 1)
    return root


def all_ended(runs: dict[str, tuple[str, list[Start]]], root: Path) -> Path:
    """All starts of some runs, in as few launches as possible; and runs without interruption."""
    left = {name: list(starts) for name, (_, starts) in runs.items()}
    for name, (_, starts) in runs.items():
        if len({start[:2] for start in starts}) == 1:
            left[f"{name}, whole"] = [starts[-1]]
    fits = {name: runs[name.removesuffix(", whole")][0] for name in left}
    while any(left.values()):
        number = max(starts[0][0] for starts in left.values() if starts)
        if any(starts and starts[0][0] == 1 for starts in left.values()):
            number = 1
        due = []
        for name, starts in left.items():
            now = next((list(of) for n, of in groupby(starts, lambda s: s[0]) if n == number), [])
            if starts and starts[0][0] == number:
                del starts[: len(now)]
                due += [
                    {"name": name, "fit": fits[name], "shard": shard, "steps": steps}
                    for _, shard, steps in now
                ]
        if number == 1:
            worker_layouts.run(root, due)
            continue
        script = HERE / "worker_layouts.py"
        done = run_workers(script, number, root, json.dumps(due), timeout=300)
        assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return all_ended(RUNS, tmp_path_factory.mktemp("ended"))


@pytest.fixture(scope="module")
def more_ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return all_ended(MORE_RUNS, tmp_path_factory.mktemp("more-ended"))


@pytest.mark.parametrize("run", RUNS)
def test_a_run_goes_on_whoever_shares_the_factors(ended: Path, alone: Path, run: str):
    assert_gone_on(ended, alone, run, RUNS)


@pytest.mark.parametrize("run", MORE_RUNS)
def test_a_run_of_up_to_four_workers_goes_on_whoever_shares(
    more_ended: Path, alone: Path, run: str
):
    assert_gone_on(more_ended, alone, run, MORE_RUNS)


def assert_gone_on(
    root: Path, alone: Path, run: str, runs: dict[str, tuple[str, list[Start]]]
) -> None:
    fit, starts = runs[run]
    if (root / f"{run}, whole").exists():
        assert content(root / run) == content(root / f"{run}, whole")
    one, other = load_factors(root / run), load_factors(alone / fit)
    assert set(one.manifest["files"]) == set(other.manifest["files"])
    assert one.manifest["data"] == other.manifest["data"]
    assert_same_halves(one, other)
    for name, module in other.modules.items():
        assert relative(dense_E(one, name), dense_E(other, name)) < 1e-10
        assert counts_in(one, "eigenbasis", module) == counts_in(other, "eigenbasis", module)
    # What was saved is taken up, whoever saved it: no pass takes a sequence twice.
    taken = Counter()
    for number in range(len(starts)):
        taken.update(json.loads((root / f"{run}-{number}.json").read_text()))
    num_passes = 2 * FITS[fit][1].get("partitions", 1)
    assert taken == dict.fromkeys(range(NUM_EXAMPLES), num_passes)
