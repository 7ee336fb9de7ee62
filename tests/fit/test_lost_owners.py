"""Workers that share out factors are killed, stopped or ended while rows travel between them."""

import functools
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers.long_runs import STAGES, arguments, content, running, wait_for, worker
from helpers.workshop import run_cli, run_workers, save_tiny_llama, texts, write_jsonl

from ekfac_dist.errors import Preempted

HERE = Path(__file__).parent
NUMBER = 60
MESHES = [(2, 2), (4, 2)]  # workers, and how many of them share one copy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and data."""
    root = tmp_path_factory.mktemp("lost-owners")
    save_tiny_llama(root / "model")
    write_jsonl(root / "text.jsonl", [{"text": text} for text in texts(NUMBER)])
    return root


def shared_out(root: Path, output: Path, shard: int) -> list[str | Path]:
    return [*arguments(root, output), "--factors.shard", str(shard)]


@pytest.fixture(scope="module")
def whole(root: Path):
    """What a run that nothing has interrupted leaves, by workers and shard."""

    @functools.cache
    def of(workers: int, shard: int) -> dict[str, bytes]:
        store = root / f"whole-{workers}-{shard}"
        done = run_cli(shared_out(root, store, shard), workers=workers, timeout=180)
        assert done.returncode == 0, done.stderr
        return content(store)

    return of


def goes_on(root: Path, store: Path, workers: int, shard: int) -> dict[str, bytes]:
    done = run_cli(shared_out(root, store, shard), workers=workers, timeout=180)
    assert done.returncode == 0, done.stderr
    return content(store)


def lost_owner(process: subprocess.Popen[str], rank: int):
    found = worker(process, rank)
    assert found is not None
    return found


@pytest.mark.parametrize("stage", ["covariance", "refit"])
@pytest.mark.parametrize(("rank", "minutes"), [(0, 0), (1, 0), (1, 0.0001)])
@pytest.mark.parametrize(("workers", "shard"), MESHES)
def test_a_killed_owner_ends_the_run_which_goes_on(
    root: Path,
    whole,
    tmp_path: Path,
    workers: int,
    shard: int,
    rank: int,
    minutes: float,
    stage: str,
):
    store = tmp_path / "store"
    given = [*shared_out(root, store, shard), "--save_minutes", str(minutes)]
    with running(root, store, workers, given=given) as process:
        assert wait_for(lambda: any(store.glob(STAGES[stage])), process, 120)
        time.sleep(random.Random(rank).random() / 4)
        lost_owner(process, rank).kill()
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr
    assert re.findall(r"ekfac-dist: error: .*", stderr)[-1].endswith("was ended by SIGKILL")
    assert f"worker {rank}" in re.findall(r"ekfac-dist: error: .*", stderr)[-1]
    assert goes_on(root, store, workers, shard) == whole(workers, shard)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("workers", "shard", "victim"), [(2, 2, 1), (4, 2, 2), (4, 2, 0)])
def test_an_owner_killed_in_the_middle_of_an_exchange_ends_the_run_which_goes_on(
    root: Path, whole, tmp_path: Path, workers: int, shard: int, victim: int, when: str
):
    store, number = tmp_path / "store", 10
    given = (victim, number, when, *shared_out(root, store, shard))
    done = run_workers(HERE / "worker_lost_owner.py", workers, *map(str, given), timeout=60)
    assert done.returncode == 1
    causes = re.search(r"Root Cause.*", done.stderr, re.DOTALL)
    assert causes is not None, done.stderr
    assert re.search(rf"rank +: {victim} .*\n +exitcode +: -9 ", causes[0]), done.stderr
    assert any(store.glob(STAGES["covariance"])), "no step had ended before"
    assert goes_on(root, store, workers, shard) == whole(workers, shard)


@pytest.mark.parametrize(("workers", "shard", "rank"), [(2, 2, 1), (4, 2, 2)])
def test_a_stopped_owner_is_named_and_the_run_goes_on(
    root: Path, whole, tmp_path: Path, workers: int, shard: int, rank: int
):
    store = tmp_path / "store"
    with running(root, store, workers, given=shared_out(root, store, shard)) as process:
        assert wait_for(lambda: any(store.glob(STAGES["covariance"])), process, 120)
        lost_owner(process, rank).suspend()
        assert wait_for(lambda: process.poll() is not None, process, 110), "it still waits"
        _, stderr = process.communicate(timeout=10)
    assert process.returncode == 1
    said = re.findall(r"ekfac-dist: error: (.*)", stderr)
    assert any(f"worker {rank} of {workers} has not answered" in line for line in said), stderr
    assert goes_on(root, store, workers, shard) == whole(workers, shard)


@pytest.mark.parametrize("target", ["the launcher", "0", "3"])
def test_sigterm_ends_all_copies_and_the_run_goes_on(
    root: Path, whole, tmp_path: Path, target: str
):
    store = tmp_path / "store"
    with running(root, store, 4, given=shared_out(root, store, 2)) as process:
        assert wait_for(lambda: any(store.glob(STAGES["covariance"])), process, 120)
        ended = process if target == "the launcher" else lost_owner(process, int(target))
        ended.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == Preempted.status, stderr
    assert "Traceback" not in stderr
    assert goes_on(root, store, 4, 2) == whole(4, 2)


@pytest.mark.parametrize(("step", "slow", "minutes", "later"), [(2, 3, 0, 0), (3, 0, 10, 1)])
def test_sigterm_in_a_long_step_of_one_copy_saves_every_owners_sums(
    root: Path, whole, tmp_path: Path, step: int, slow: int, minutes: int, later: int
):
    store = tmp_path / "store"
    given = (tmp_path, step, slow, *shared_out(root, store, 2), "--save_minutes", minutes)
    run_workers(HERE / "worker_long_steps.py", 4, *map(str, given), timeout=120)
    statuses = [(tmp_path / str(rank)).read_text() for rank in range(4)]
    assert statuses == [str(Preempted.status)] * 4
    # Not a step is lost. Where sums are not saved after every step, all learn of SIGTERM in the
    # next one.
    states = {part.parent.name for part in store.glob("state/covariance-1/*/part.json")}
    assert states == {f"0-{rank}-{step + later}" for rank in range(4)}
    assert goes_on(root, store, 4, 2) == whole(4, 2)
