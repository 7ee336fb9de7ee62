"""A worker that is stopped or killed is named by the others, which do not wait for it."""

import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist
from helpers.workshop import free_port, logged, start_without_launcher

from ekfac_dist.runtime import heartbeat
from ekfac_dist.runtime.processes import World

HERE = Path(__file__).parent
STORE = "import torch.distributed as d; s = d.TCPStore('127.0.0.1', {}, is_master=True); input()"


def outcomes(
    workers: int, victim: int, sent: str = "SIGSTOP", owner: str = "program"
) -> dict[int, tuple[int, str, str]]:
    """Exit status, output and errors of every worker but the victim, which is killed at the end."""
    store = dist.TCPStore("127.0.0.1", free_port(), is_master=True)
    command = [str(HERE / "worker_heartbeat.py"), str(victim), sent, owner]
    processes = start_without_launcher(command, workers, store)
    found = {}
    try:
        for rank, process in enumerate(processes):
            if rank != victim:
                found[rank] = (process, *process.communicate(timeout=60))
    finally:
        for process in processes:
            process.kill()
            process.communicate()
        del store
    return {rank: (process.returncode, out, err) for rank, (process, out, err) in found.items()}


@pytest.mark.parametrize(
    ("workers", "victim", "sent"),
    [
        (2, 0, "SIGSTOP"),
        pytest.param(3, 1, "SIGSTOP", marks=pytest.mark.slow),
        pytest.param(3, 1, "SIGKILL", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_worker_is_named_once_and_the_others_end(workers: int, victim: int, sent: str):
    found = outcomes(workers, victim, sent)
    assert [status for status, _, _ in found.values()] == [1] * (workers - 1)
    said = "".join(err for _, _, err in found.values())
    assert said.count(f"worker {victim} of {workers} has not answered for 2 seconds") == 1


@pytest.mark.slow
@pytest.mark.parametrize("sent", ["SIGSTOP", "SIGKILL"])
def test_workers_whose_key_value_store_is_lost_end(sent: str):
    """A stopped store is silent and closes no connection, as if its host had lost its network."""
    store = SimpleNamespace(port=free_port())
    of_store = [sys.executable, "-c", STORE.format(store.port)]
    with subprocess.Popen(of_store, stdin=subprocess.PIPE) as host:
        command = [str(HERE / "worker_heartbeat.py"), "0", sent, "program", str(host.pid)]
        processes = start_without_launcher(command, 2, store)
        try:
            said = [process.communicate(timeout=60)[1] for process in processes]
        finally:
            for process in (*processes, host):
                process.kill()
    assert [process.returncode for process in processes] == [1, 1]
    for errors in said:
        assert errors.count(heartbeat._NO_STORE) == 1


@pytest.mark.slow
@pytest.mark.parametrize("sent", ["SIGSTOP", "SIGKILL"])
def test_in_a_script_who_waits_for_a_worker_that_is_lost_raises_and_names_it(sent: str):
    found = outcomes(3, 1, sent, "script")
    assert [status for status, _, _ in found.values()] == [1] * 2
    for _, sentence, _ in found.values():
        assert "worker 1 of 3 has not answered for 2 seconds: it was stopped, or its " in sentence


def test_workers_that_are_well_wait_for_each_other():
    assert [out for _, out, _ in outcomes(2, -1).values()] == ["went on\n"] * 2


class Ended(BaseException):
    """Instead of the end of the process."""


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ends of the process are called, which are exceptions here."""
    said: list[str] = []

    def end(world: World, store: object, message: str) -> NoReturn:
        said.append(message)
        raise Ended

    monkeypatch.setattr(heartbeat, "_end_process", end)
    return said


def test_a_worker_that_is_cut_off_from_the_store_ends(ends: list[str]):
    alone, is_over = World(1, 2, 0, torch.device("cpu"), "gloo"), threading.Event()
    with pytest.raises(Ended):
        heartbeat._require_answers(alone, 0.001, is_over, heartbeat._Answers(), True)
    assert ends == [heartbeat._NO_STORE]


def test_in_a_script_it_is_said_and_the_process_is_left_alone(ends: list[str]):
    alone, is_over = World(1, 2, 0, torch.device("cpu"), "gloo"), threading.Event()
    with logged() as lines:
        heartbeat._require_answers(alone, 0.001, is_over, heartbeat._Answers(), False)
    assert not ends
    (line,) = lines
    assert line.startswith(f"worker 1 of 2: {heartbeat._NO_STORE}. This worker's wait for others")


def test_a_worker_whose_store_answers_is_left_alone(ends: list[str]):
    alone, answers = World(1, 2, 0, torch.device("cpu"), "gloo"), heartbeat._Answers()

    class Waits:
        """An event that comes after many beats, in each of which the store has answered."""

        def wait(self, seconds: float) -> bool:
            answers.number += 1
            return answers.number > 10 * heartbeat.BEATS

    heartbeat._require_answers(alone, 0.001, Waits(), answers, True)
    assert not ends
