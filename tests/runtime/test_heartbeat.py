"""A worker that is stopped or killed is named by the others, which do not wait for it."""

from pathlib import Path

import pytest
import torch.distributed as dist
from helpers.workshop import free_port, start_without_launcher

HERE = Path(__file__).parent


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
def test_in_a_script_who_waits_for_a_worker_that_is_lost_raises_and_names_it(sent: str):
    found = outcomes(3, 1, sent, "script")
    assert [status for status, _, _ in found.values()] == [1] * 2
    for _, sentence, _ in found.values():
        assert "worker 1 of 3 has not answered for 2 seconds: it was stopped, or its " in sentence


def test_workers_that_are_well_wait_for_each_other():
    assert [out for _, out, _ in outcomes(2, -1).values()] == ["went on\n"] * 2
