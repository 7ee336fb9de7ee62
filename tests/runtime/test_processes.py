"""Real gloo workers agree, add up, and never wait for one that has gone."""

import json
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.workshop import (
    free_port,
    run_cli,
    run_workers,
    save_tiny_llama,
    start_without_launcher,
    texts,
    write_jsonl,
)
from worker_collectives import CHECKS

from ekfac_dist.errors import DataError, LaunchError
from ekfac_dist.runtime.collectives import _buckets
from ekfac_dist.runtime.peers import was_agreed
from ekfac_dist.runtime.processes import World

HERE = Path(__file__).parent
NAMES = [check.__name__ for check in CHECKS]


# -- everyone is well ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 3])
def became(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, str]]:
    """What became of each check, by worker."""
    directory = tmp_path_factory.mktemp(f"{request.param} workers")
    done = run_workers(HERE / "worker_collectives.py", request.param, directory, timeout=90)
    assert done.returncode == 0, done.stderr
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("name", NAMES)
def test_workers_agree_that(name: str, became: list[dict[str, str]]):
    for told in became:
        assert told[name] == "held", told[name]


# -- someone has gone ------------------------------------------------------------------------------


def survivors(
    workers: int, victim: int, manner: str, collective: str, *, store_outlives: bool = False
) -> dict[int, str]:
    """What each of the others says, without a launcher that would end them.

    The key-value store is worker 0's and goes with it, or outlives them all as a launcher's does.
    """
    store = dist.TCPStore("127.0.0.1", free_port(), is_master=True) if store_outlives else None
    command = [str(HERE / "worker_death.py"), str(victim), manner, collective]
    processes = start_without_launcher(command, workers, store)
    try:
        told = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, process in enumerate(processes):
        assert process.returncode == (2 if rank != victim else process.returncode), told[rank][1]
    return {rank: stdout.strip() for rank, (stdout, _) in enumerate(told) if rank != victim}


@pytest.mark.parametrize(
    ("workers", "victim", "manner", "collective"),
    [(2, 0, "exit", "none"), (2, 0, "kill", "all_reduce"), (3, 1, "kill", "gather")],
)
def test_a_worker_that_dies_is_missed_at_once(
    workers: int, victim: int, manner: str, collective: str
):
    for rank, sentence in survivors(workers, victim, manner, collective).items():
        # One of them is the first to know; another may be told by it.
        assert re.fullmatch(
            rf"(worker [^{rank}{victim}] of {workers}: )?The connection to another worker was lost "
            r"\([^/]+\): it has ended without a word\. Look for that worker's own message, or .*\.",
            sentence,
        ), sentence


def test_a_failure_announced_before_leaving_is_what_the_others_tell():
    said = survivors(3, 1, "announce", "all_reduce", store_outlives=True)
    assert said == dict.fromkeys((0, 2), "worker 1 of 3: NaN in module a.")


def test_a_worker_that_the_system_ends_ends_the_run(tmp_path: Path):
    """Worker 1 is killed as it loads the model, while worker 0 waits for it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def hook(event, arguments):\n"
        "    if event == 'open' and 'modeling_llama' in str(arguments[0]):\n"
        "        os.kill(os.getpid(), 9)\n"
        "if os.environ.get('RANK') == '1':\n"
        "    sys.addaudithook(hook)\n"
    )
    model = save_tiny_llama(tmp_path / "model")
    data = write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in texts(4)])
    options = ["--model.name", model, "--data.source", data, "--output", tmp_path / "factors"]
    start = time.monotonic()
    done = run_cli(["estimate", *options], workers=2, env={"PYTHONPATH": str(tmp_path)})
    assert time.monotonic() - start < 60
    assert done.returncode == 1
    assert f"error: worker 1 was ended by {signal.SIGKILL.name}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "factors").exists()


# -- one worker alone ------------------------------------------------------------------------------


def test_one_worker_needs_no_group():
    world = World.start()
    assert (world.rank, world.size, world.backend, world.is_main) == (0, 1, "none", True)
    assert world.gather("mine") == ["mine"]
    assert world.share("mine") == "mine"
    assert world.main_first(lambda: "made") == "made"
    assert world.on_main(lambda: "made") == "made"
    tensor = torch.arange(3)
    assert world.broadcast_(tensor) is tensor
    world.all_reduce_([tensor])
    assert tensor.tolist() == [0, 1, 2]
    assert world.announce_failure(ValueError("nobody hears it")) is True
    world.check_peers()
    world.barrier()
    world.close()


def test_one_worker_raises_what_it_meets():
    world, error = World.start(), DataError("No rows.")
    with pytest.raises(DataError, match=r"^No rows\.$") as caught, world.agree():
        raise error
    assert caught.value is error
    assert not was_agreed(error)


def test_a_launcher_that_started_more_workers_than_see_each_other_is_refused(
    monkeypatch: pytest.MonkeyPatch,
):
    World.start()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match=r"started 2 workers, but this one sees 1\. .*cpu=True"):
        World.start()


# -- buckets ---------------------------------------------------------------------------------------


def test_buckets_keep_to_their_limit_and_to_one_dtype():
    tensors = [
        torch.zeros(size, dtype=dtype)
        for size, dtype in [(3, torch.float32), (2, torch.int64), (5, torch.float32)] * 4
        + [(100, torch.float32)]
    ]
    buckets = list(_buckets(tensors, 64))
    for bucket in buckets:
        assert len({tensor.dtype for tensor in bucket}) == 1
        assert sum(tensor.nbytes for tensor in bucket) <= 64 or len(bucket) == 1
    flat = [id(tensor) for bucket in buckets for tensor in bucket]
    assert sorted(flat) == sorted(map(id, tensors))
    of_one_dtype = [id(tensor) for tensor in tensors if tensor.dtype == torch.float32]
    assert [number for number in flat if number in of_one_dtype] == of_one_dtype
    assert len(buckets) < len(tensors)


def test_no_tensors_are_no_buckets():
    assert list(_buckets([], 64)) == []
