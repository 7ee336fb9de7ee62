"""A worker that is stopped or killed is named by the others, which do not wait for it."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from helpers.workshop import free_port, start_without_launcher

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


def test_workers_end_when_their_key_value_store_falls_silent():
    """As after the loss of its host's network, it is silent, and no connection is closed."""
    store = SimpleNamespace(port=free_port())
    of_store = [sys.executable, "-c", STORE.format(store.port)]
    with subprocess.Popen(of_store, stdin=subprocess.PIPE) as host:
        command = [str(HERE / "worker_heartbeat.py"), "0", "SIGSTOP", "program", str(host.pid)]
        processes = start_without_launcher(command, 2, store)
        try:
            said = [process.communicate(timeout=60)[1] for process in processes]
        finally:
            for process in (*processes, host):
                process.kill()
    assert [process.returncode for process in processes] == [1, 1]
    for rank, errors in enumerate(said):
        assert f"worker {rank} of 2: worker 0's host" in errors
        assert "has not answered for 2 seconds" in errors


@pytest.mark.slow
@pytest.mark.parametrize("sent", ["SIGSTOP", "SIGKILL"])
def test_in_a_script_who_waits_for_a_worker_that_is_lost_raises_and_names_it(sent: str):
    found = outcomes(3, 1, sent, "script")
    assert [status for status, _, _ in found.values()] == [1] * 2
    for _, sentence, _ in found.values():
        assert "worker 1 of 3 has not answered for 2 seconds: it was stopped, or its " in sentence


def test_workers_that_are_well_wait_for_each_other():
    assert [out for _, out, _ in outcomes(2, -1).values()] == ["went on\n"] * 2
