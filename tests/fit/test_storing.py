"""Factors that are shared out: who decomposes and stores them, and on which disk."""

import json
import random
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import worker_storing
from helpers import long_runs
from helpers.dense import counts_in, dense_E, relative
from helpers.killed_fits import content
from helpers.long_runs import STAGES, family, running, wait_for, worker
from helpers.workshop import run_cli, run_workers, save_tiny_llama, texts, write_jsonl
from test_hosts_and_disks import fill, small_disk
from worker_storing import FITS, MORE_FITS

from ekfac_dist import load_factors
from ekfac_dist.factors.layout import MANIFEST
from ekfac_dist.runtime.journal import JOURNAL
from ekfac_dist.runtime.lock import LOCK

HERE = Path(__file__).parent
SLOW = pytest.mark.slow
PARTS = ["fits", "memory", "full_disk", "no_directory", "hosts"]
MORE_PARTS = ["more_fits", "overwrite", "weights"]
NUM_FACTORS = 10


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same fits by one worker."""
    root = tmp_path_factory.mktemp("alone")
    for name, settings in {**FITS, **MORE_FITS}.items():
        worker_storing.fit(root / name, **settings)
    return root


Said = dict[str, dict[int, list[str]]]


def said_by(stdout: str) -> Said:
    """What each worker said at each step, by the step and the worker's rank."""
    said: Said = {}
    for rank, step, what in re.findall(r"WORKER (\d) ([\w ,]+): (.*)", stdout):
        said.setdefault(step, {}).setdefault(int(rank), []).append(what)
    return said


Run = tuple[Path, Said, int]  # the stores, what was said, the number of workers


@pytest.fixture(scope="module")
def by_four(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All parts of worker_storing.py, by two copies of two workers."""
    return run_of(4, PARTS + MORE_PARTS, tmp_path_factory.mktemp("by-four"))


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=SLOW)])
def shared_out(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Parts of worker_storing.py, by one copy of two workers, and by two copies."""
    if request.param == 4:
        return request.getfixturevalue("by_four")
    return run_of(2, PARTS, tmp_path_factory.mktemp("by-two"))


def run_of(workers: int, parts: list[str], root: Path) -> Run:
    done = run_workers(HERE / "worker_storing.py", workers, root, "2", *parts, timeout=300)
    assert done.returncode == 0, done.stderr
    return root, said_by(done.stdout), workers


def assert_same_factors(store: Path, alone: Path) -> None:
    one, other = load_factors(store), load_factors(alone)
    assert set(one.manifest["files"]) == set(other.manifest["files"])
    assert one.manifest["data"] == other.manifest["data"]
    for name, module in other.modules.items():
        assert relative(dense_E(one, name), dense_E(other, name)) < 1e-12
        assert counts_in(one, "eigenbasis", module) == counts_in(other, "eigenbasis", module)


def numbers(said: dict[int, list[str]]) -> list[list[int]]:
    """The numbers that each worker said."""
    return [[int(n) for n in re.findall(r"\d+", said[rank][0])] for rank in sorted(said)]


# -- who decomposes, who stores --------------------------------------------------------------------


@pytest.mark.parametrize("fit", FITS)
def test_shared_out_factors_are_the_same_whoever_decomposes_them(alone, shared_out, fit):
    assert_decomposed_and_stored(shared_out, fit, alone)


@pytest.mark.slow
@pytest.mark.parametrize("fit", MORE_FITS)
def test_factors_of_two_copies_are_the_same_whoever_decomposes_them(alone, by_four, fit):
    assert_decomposed_and_stored(by_four, fit, alone)


def assert_decomposed_and_stored(run: Run, fit: str, alone: Path) -> None:
    root, said, workers = run
    assert_same_factors(root / fit, alone / fit)
    written, decomposed = zip(*numbers(said[fit]), strict=True)
    per_factor = 2 if "blocks" in fit else 1
    assert sum(decomposed) == NUM_FACTORS * per_factor
    if fit.startswith("rank0"):
        assert decomposed[0] == sum(decomposed)
    else:
        assert max(decomposed) <= 3 * per_factor * 4 / workers
        assert min(decomposed) > 0
    # Sums, bases and Λ: each is written once, by its owner or by who decomposed it.
    assert sum(written) == 2 * NUM_FACTORS + len(load_factors(root / fit).modules)
    assert min(written[:2]) > 2


def test_factors_that_are_shared_out_are_not_kept_in_memory(shared_out):
    _, said, workers = shared_out
    sentences = [sentence for own in said["in memory"].values() for sentence in own]
    assert len(sentences) == workers
    for sentence in sentences:
        assert re.search(
            "shard is 2 and output is None: .* Give an output directory .*, or shard=1", sentence
        )


@pytest.mark.slow
def test_a_store_that_is_replaced_ends_as_a_new_one(by_four):
    root, _, _ = by_four
    assert content(root / "overwritten") == content(root / "auto")


@pytest.mark.slow
def test_sharded_weights_leave_the_device_while_factors_are_decomposed(alone, by_four):
    root, said, workers = by_four
    assert numbers(said["weights"]) == [[0]] * workers
    assert_same_factors(root / "weights", alone / "auto")


# -- disks -----------------------------------------------------------------------------------------


def test_a_worker_whose_disk_is_full_is_named_on_all_and_nothing_else_is_lost(shared_out):
    root, said, workers = shared_out
    for sentence, *_ in said["full disk"].values():
        assert re.search(
            rf"worker {workers - 1} of {workers}: .*eigenbasis.* cannot be written: No space left",
            sentence,
        )
    passes, decomposed = zip(*numbers(said["after a full disk"]), strict=True)
    assert set(passes) == {1}  # the refit
    # All of three rounds but that one: the third was decomposed while the second was written.
    assert sum(decomposed) == NUM_FACTORS - (min(3 * workers, NUM_FACTORS) - 1)
    assert content(root / "full") == content(root / "auto")


def test_a_worker_that_cannot_write_is_found_out_before_the_first_pass(shared_out):
    _, said, workers = shared_out
    told = said["no directory"]
    assert len(told) == workers
    for sentence, passes in told.values():
        assert re.search(
            rf"worker {workers - 1} of {workers}: output .*a file/store cannot be made: Not a dir",
            sentence,
        )
        assert passes == "passes 0"


def test_workers_that_see_no_common_disk_fit_the_same_factors_and_that_is_said(alone, shared_out):
    root, said, workers = shared_out
    for name in ("hosts", "hosts, whole"):
        assert_same_factors(root / "host0" / name, alone / "auto")
        lines = said[name][0]
        assert set(said[name]) == {0}
        assert any(
            re.search(r"workers? 1\b.* another disk than worker 0, .*each one's own disk", line)
            for line in lines
        )
        for rank in range(1, workers):
            assert not list((root / f"host{rank}" / name).glob("*"))


def test_saved_states_that_nobody_can_read_any_more_are_said(shared_out):
    _, said, workers = shared_out
    for sentence, *_ in said["hosts, begun"].values():
        assert "Ended by SIGTERM" in sentence
    lost = {name: [line for line in said[name][0] if "saved states  " in line] for name in said}
    whole = f"{workers - 2}, {workers - 1}"  # of one copy
    assert len(lost["hosts"]) == len(lost["hosts, whole"]) == 1
    assert re.search(
        rf"covariance-1: those of workers {whole} of {workers} .*copy; .* summed again",
        lost["hosts"][0],
    )
    assert re.search(
        rf"covariance-1: those of worker {workers - 1} of {workers} cannot .* summed again",
        lost["hosts, whole"][0],
    )


# -- killed, preempted, or on a disk that fills up -------------------------------------------------


def arguments(root: Path, output: Path) -> list[str | Path]:
    return [*long_runs.arguments(root, output), "--factors.shard", "2"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of many factors, and data, and what an uninterrupted run makes of them."""
    root = tmp_path_factory.mktemp("storing")
    save_tiny_llama(root / "model", num_hidden_layers=12)
    write_jsonl(root / "text.jsonl", [{"text": text} for text in texts(20)])
    done = run_cli(arguments(root, root / "whole"), workers=2, timeout=120)
    assert done.returncode == 0, done.stderr
    return root


def goes_on(root: Path, store: Path) -> None:
    if (store / MANIFEST).exists() and json.loads((store / MANIFEST).read_text())["complete"]:
        for left in (JOURNAL, LOCK):  # it had ended, but for what it leaves behind
            (store / left).unlink(missing_ok=True)
    else:
        done = run_cli(arguments(root, store), workers=2, timeout=120)
        assert done.returncode == 0, done.stderr
    assert long_runs.content(store) == long_runs.content(root / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(12))
def test_a_run_ended_at_any_moment_of_the_decomposition_goes_on_to_the_same_bytes(
    setting: Path, tmp_path: Path, number: int
):
    draw, store = random.Random(number), tmp_path / "store"
    victim = ("all", "0", "1", "SIGTERM")[number % 4]
    with running(setting, store, given=arguments(setting, store)) as process:
        assert wait_for(lambda: any(store.glob(STAGES["decomposition"])), process)
        time.sleep(0.5 * draw.random())
        end(process, victim)
        _, stderr = process.communicate(timeout=60)
    if victim == "SIGTERM":
        assert "Traceback" not in stderr
    goes_on(setting, store)


def end(process: subprocess.Popen[str], victim: str) -> None:
    if victim == "SIGTERM":
        process.send_signal(signal.SIGTERM)
        return
    found = worker(process, int(victim)) if victim != "all" else None
    for member in family(process) if victim == "all" else [found]:
        with suppress(psutil.NoSuchProcess):
            if member is not None:
                member.kill()


@pytest.mark.root
def test_a_disk_that_fills_up_while_owners_write_ends_the_run_and_it_goes_on(
    setting: Path, tmp_path: Path
):
    with small_disk(tmp_path / "disk", 40) as disk:
        store = disk / "store"
        with running(setting, store, given=arguments(setting, store)) as process:
            assert wait_for(lambda: any(store.glob(STAGES["decomposition"])), process)
            ballast = fill(disk)
            _, stderr = process.communicate(timeout=60)
        assert process.returncode == 2, stderr
        assert "Traceback" not in stderr
        assert re.search("No space left|are free", stderr)
        ballast.unlink()
        goes_on(setting, store)
