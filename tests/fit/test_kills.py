"""Real runs that are killed, preempted or stopped: they end by themselves, and go on afterwards."""

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
from helpers.dense import dense_E, relative
from helpers.long_runs import STAGES, arguments, content, family, running, wait_for, worker
from helpers.workshop import run_cli, save_tiny_llama, texts, write_jsonl

from ekfac_dist import load_factors
from ekfac_dist.factors.layout import FOLDERS, MANIFEST
from ekfac_dist.runtime.journal import JOURNAL
from ekfac_dist.runtime.lock import LOCK

NUMBER = 60


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and data, and what an uninterrupted run makes of them."""
    root = tmp_path_factory.mktemp("kills")
    save_tiny_llama(root / "model")
    write_jsonl(root / "text.jsonl", [{"text": text} for text in texts(NUMBER)])
    done = run_cli(arguments(root, root / "whole"), workers=2, timeout=120)
    assert done.returncode == 0, done.stderr
    return root


def kill(process: subprocess.Popen[str], victim: str) -> None:
    if victim == "all":
        members = family(process)
    else:
        found = worker(process, int(victim))
        members = [] if found is None else [found]
    for member in members:
        with suppress(psutil.NoSuchProcess):
            member.kill()


def goes_on_to_the_end(root: Path, output: Path, workers: int) -> None:
    if (output / MANIFEST).exists() and json.loads((output / MANIFEST).read_text())["complete"]:
        same = True  # it had ended before it was killed, but for what it leaves behind
        for left in (JOURNAL, LOCK):
            (output / left).unlink(missing_ok=True)
    else:
        done = run_cli(arguments(root, output), workers=workers, timeout=120)
        assert done.returncode == 0, done.stderr
        same = workers == 2
    if same:
        assert content(output) == content(root / "whole")
        return
    went_on, whole = load_factors(output), load_factors(root / "whole")
    assert went_on.manifest["data"] == whole.manifest["data"]
    assert {path.name for path in output.iterdir()} == {MANIFEST, *FOLDERS}
    for name in whole.modules:
        assert relative(dense_E(went_on, name), dense_E(whole, name)) < 1e-6


@pytest.mark.parametrize(
    ("stage", "victim", "workers"),
    [("refit", "1", 2), pytest.param("covariance", "all", 3, marks=pytest.mark.slow)],
)
def test_a_killed_run_goes_on(setting: Path, tmp_path: Path, stage: str, victim: str, workers: int):
    with running(setting, tmp_path / "store") as process:
        assert wait_for(lambda: any((tmp_path / "store").glob(STAGES[stage])), process)
        kill(process, victim)
        _, stderr = process.communicate(timeout=60)
    if victim != "all":
        assert process.returncode == 1
        assert re.findall(r"ekfac-dist: error: .*", stderr)[-1].endswith("was ended by SIGKILL")
    goes_on_to_the_end(setting, tmp_path / "store", workers)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(36))
def test_a_run_killed_at_any_moment_goes_on(setting: Path, tmp_path: Path, number: int):
    draw = random.Random(number)
    victim, workers = ("all", "0", "1")[number % 3], (2, draw.choice([1, 3]))[number // 3 % 2]
    with running(setting, tmp_path / "store") as process:
        if number < 24:
            folder = tmp_path / "store"
            moment = draw.choice(list(STAGES.values()))
            wait_for(lambda: any(folder.glob(moment)), process)
            time.sleep(draw.random())
        else:
            time.sleep(draw.uniform(1, 14))
        kill(process, victim)
        process.communicate(timeout=60)
    goes_on_to_the_end(setting, tmp_path / "store", workers)


@pytest.mark.parametrize(
    ("stage", "target"),
    [
        ("covariance", "the launcher"),
        pytest.param("refit", "0", marks=pytest.mark.slow),
        pytest.param("decomposition", "the launcher", marks=pytest.mark.slow),
        pytest.param("covariance", "1", marks=pytest.mark.slow),
    ],
)
def test_a_preempted_run_stores_its_state_and_goes_on(
    setting: Path, tmp_path: Path, stage: str, target: str
):
    store = tmp_path / "store"
    with running(setting, store) as process:
        assert wait_for(lambda: any(store.glob(STAGES[stage])), process)
        if target == "the launcher":
            process.send_signal(signal.SIGTERM)
        else:
            found = worker(process, int(target))
            assert found is not None
            found.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert "Traceback" not in stderr
    assert "SIGTERM" in stderr
    assert (store / JOURNAL).exists()
    goes_on_to_the_end(setting, store, 2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_whose_worker_is_stopped_ends_by_itself_and_names_it(
    setting: Path, tmp_path: Path, stage: str, rank: int
):
    store = tmp_path / "store"
    with running(setting, store) as process:
        assert wait_for(lambda: any(store.glob(STAGES[stage])), process)
        found = worker(process, rank)
        assert found is not None
        found.suspend()
        if not wait_for(lambda: process.poll() is not None, process, 110):
            raise AssertionError("it still waits")
        _, stderr = process.communicate(timeout=10)
    if process.returncode == 0:
        pytest.fail("it ended before the worker was stopped")
    assert process.returncode == 1
    said = re.findall(r"ekfac-dist: error: (.*)", stderr)
    assert any(f"worker {rank} of 2 has not answered" in line for line in said), stderr
    goes_on_to_the_end(setting, store, 2)
