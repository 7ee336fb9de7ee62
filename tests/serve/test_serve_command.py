"""`serve`, the command: what it refuses, how it ends, and many workers that answer together."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
import torch.distributed as dist
from helpers.fake_session import exact_scores
from helpers.services import Running, events_of, until
from helpers.workshop import free_port, run_here, start_without_launcher, with_helpers

from ekfac_dist.config import ServeConfig
from ekfac_dist.errors import ConfigError
from ekfac_dist.serve.http import bound_socket

HERE = Path(__file__).parent
GOOD = ["serve", "--factors", "f", "--index", "i"]


@pytest.fixture(autouse=True)
def _no_token(monkeypatch):
    monkeypatch.delenv("EKFAC_DIST_TOKEN", raising=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "host is 0.0.0.0, which other machines can reach"),
        (["--host", "gpu.example"], "so a token is needed"),
        (["--host", "::"], "EKFAC_DIST_TOKEN"),
        (["--host", ""], "host is not given"),
        (["--token", ""], "token is empty"),
        (["--token", "two words"], "openssl rand -hex 16"),
        (["--token", "tökén"], "other than ASCII's"),
        (["--port", "65536"], "from 0 to 65535"),
        (["--port", "http"], "port is http; it must be a whole number"),
        (["--queue_length", "0"], "queue_length is 0; it must be a whole number of 1 or more"),
        (["--drain_seconds", "-1"], "drain_seconds is -1"),
        (["--max_top_k", "0"], "max_top_k is 0"),
        (["--factors", ""], "factors is not given"),
        (["--index", ""], "index is not given"),
        (["--tokne", "x"], "did you mean --token"),
    ],
)
def test_wrong_settings_are_refused_in_a_sentence(options, words):
    done = run_here([*GOOD, *options])
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.5.5.5"])
def test_a_loopback_address_needs_no_token(host):
    assert ServeConfig(factors="f", index="i", host=host).token is None


def test_the_token_can_come_from_the_environment_and_is_never_shown(monkeypatch):
    monkeypatch.setenv("EKFAC_DIST_TOKEN", "correct-horse")
    config = ServeConfig(factors="f", index="i", host="0.0.0.0")
    assert config.token == "correct-horse"
    assert "correct-horse" not in str(config.as_dict())
    assert ServeConfig(factors="f", index="i", token="another").token == "another"


def test_a_port_that_is_in_use_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}.*in use.*another --port"):
            bound_socket("127.0.0.1", port, has_token=False)
    with pytest.raises(ConfigError, match="no address or name that is known here"):
        bound_socket("nowhere.invalid", 0, has_token=True)
    with pytest.raises(ConfigError, match=r"Nothing can listen at 192\.0\.2\.1"):
        bound_socket("192.0.2.1", 0, has_token=True)


def test_a_name_for_an_address_that_others_reach_needs_a_token(monkeypatch):
    def elsewhere(host, port, **settings):
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("0.0.0.0", port))]

    monkeypatch.setattr(socket, "getaddrinfo", elsewhere)
    with pytest.raises(ConfigError, match=r"stands for 0\.0\.0\.0 here"):
        bound_socket("localhost", 0, has_token=False)


def test_without_its_packages_it_names_the_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "ekfac_dist.influence.session", _no_session())
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in ("fastapi", "uvicorn") else find(name, *rest),
    )
    done = run_here(GOOD)
    assert done.returncode == 2
    assert "serve needs fastapi and uvicorn, which are not installed" in done.stderr
    assert "pip install 'ekfac_dist[serve]'" in done.stderr


def _no_session():
    from worker_service import session_module

    return session_module(Path(), 0.0, 0.0)


# -- processes ---------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path):
    """Starts a service of some workers, by torch's launcher or each alone."""
    started = []

    def begin(workers=1, shard=0.0, exact=0.0, store=None, options=()):
        program = [str(HERE / "worker_service.py"), str(tmp_path), str(shard), str(exact)]
        program += options
        if workers > 1:
            processes = start_without_launcher(program, workers, store)
        else:
            processes = [
                subprocess.Popen(
                    [sys.executable, *program],
                    env={**os.environ, "ACCELERATE_USE_CPU": "true", **with_helpers()},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            ]
        started.extend(processes)
        return Running(processes)

    yield begin
    for process in started:
        process.kill()
        process.wait()


def notes(tmp_path, rank):
    file = tmp_path / f"{rank}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize(
    "sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_polite_end_waits_for_what_was_asked(start, tmp_path, sent):
    service = start(exact=0.05)
    with ThreadPoolExecutor(2) as pool:
        coming = [pool.submit(service.ask, name, damping=k) for k, name in enumerate("ab")]
        until(lambda: notes(tmp_path, 0))
        time.sleep(0.2)
        service.processes[0].send_signal(sent)
        until(lambda: httpx.get(f"{service.url}/healthz").status_code == 503)
        assert service.ask("late").status_code == 503
        assert [one.result().status_code for one in coming] == [200, 200]
    assert service.ended() == [0]
    assert service.errors() == ""
    assert "The service has ended" in service.lines[-1]
    with pytest.raises(httpx.ConnectError):
        service.ask("later")


@pytest.mark.slow
def test_all_workers_answer_and_any_of_them_can_be_asked_to_end(start, tmp_path):
    service = start(2)
    for completion in ("a", "b"):
        best = int(exact_scores(completion, 60).argmax())
        assert service.ask(completion).json()["top"][0]["index"] == best
    time.sleep(10)  # idle
    assert service.ask("c").status_code == 200
    refused = service.ask("bad")
    assert refused.status_code == 422
    assert refused.json() == {"detail": "NaN in the question's gradient."}
    assert service.ask("d").status_code == 200
    assert notes(tmp_path, 0) == notes(tmp_path, 1)
    service.processes[1].send_signal(signal.SIGTERM)
    assert service.ended() == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_any_worker_hears_a_wish_to_end_in_the_middle_of_a_question(start, tmp_path, victim):
    service = start(2, shard=1.0, exact=1.0, options=["--drain_seconds", "2"])
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(service.ask, "long")
        until(lambda: notes(tmp_path, 0))
        service.processes[victim].send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{service.url}/healthz").status_code == 503)
        assert not coming.done()
        assert coming.result().status_code == 503
    assert service.ended() == [0, 0]
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_a_cancelled_question_stops_on_every_worker(start, tmp_path):
    service = start(2, shard=0.3, exact=0.3)
    with httpx.Client(timeout=60) as client:
        for leaves_after in ("started", "sequence"):
            before = len(notes(tmp_path, 1))
            with client.stream(
                "POST",
                f"{service.url}/v1/influence",
                json={"completion": leaves_after},
                headers={"accept": "text/event-stream"},
            ) as response:
                for name, _ in events_of(response.iter_lines()):
                    if name == leaves_after:
                        break
            assert service.ask("next", rescore=0).status_code == 200
            done = notes(tmp_path, 1)[before:]
            assert done == notes(tmp_path, 0)[before:]
            assert [what for what, _ in done].count("exact") < 5  # of 10
            if leaves_after == "started":
                assert [what for what, _ in done] == ["scan", "scan", "ranked"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
@pytest.mark.parametrize("is_busy", [True, False])
def test_a_worker_that_is_killed_ends_the_service_with_its_name(start, victim, is_busy):
    store = dist.TCPStore("127.0.0.1", free_port(), is_master=True)
    service = start(3, shard=0.5, store=store)
    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        coming = pool.submit(service.ask, "a") if is_busy else None
        time.sleep(0.3)
        service.processes[victim].kill()
        if is_busy and victim:
            assert coming.result().status_code == 503
            assert "worker 1 of 3 has ended" in coming.result().json()["detail"]
        statuses = service.ended()
    assert time.monotonic() - began < 20
    assert statuses.pop(victim) == -signal.SIGKILL
    assert statuses == [1, 1]
    assert service.errors().count(f"error: worker {victim} of 3 has ended") == 1


@pytest.mark.slow
def test_a_defect_of_one_worker_ends_the_service_with_its_name(start):
    service = start(2)
    response = service.ask("defect")
    assert response.status_code == 503
    assert "worker 1 of 2" in response.json()["detail"]
    assert service.ended() == [1, 1]
    assert "worker 1 of 2 failed:" in service.errors()


@pytest.fixture
def launched(tmp_path):
    """Two workers that torch's launcher has started: their service, and its process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), str(HERE / "worker_service.py")]
    process = subprocess.Popen(
        [*command, str(tmp_path), "0.5", "0.1"],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **with_helpers()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    family = []
    try:
        service = Running([process])
        family = psutil.Process(process.pid).children(recursive=True)
        yield service, process
    finally:
        for member in (*family, process):
            with suppress(psutil.Error):
                member.kill()
        process.communicate()


@pytest.mark.slow
def test_under_a_launcher_sigterm_drains(launched, tmp_path):
    service, process = launched
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(service.ask, "a")
        until(lambda: notes(tmp_path, 0))
        process.send_signal(signal.SIGTERM)
        assert coming.result().status_code == 200
    process.wait(60)
    assert "The service has ended" in "".join(service.lines)


@pytest.mark.slow
def test_under_a_launcher_a_killed_worker_is_told_to_who_waits(launched, tmp_path):
    """The launcher ends the others with SIGTERM then, which is no wish to drain."""
    service, process = launched
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.environ().get("RANK") == "1" and "worker_service" in " ".join(child.cmdline())
    ]
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(service.ask, "a")
        until(lambda: notes(tmp_path, 0))
        workers[0].kill()
        response = coming.result()
    assert response.status_code == 503
    assert "worker 1 of 2 has ended" in response.json()["detail"]
    assert process.wait(60) == 1
