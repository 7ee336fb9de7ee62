"""Another worker of this host that has ended is noticed within seconds, and named."""

import subprocess
import sys
import threading
from types import SimpleNamespace

import psutil
import pytest

from ekfac_dist.runtime import heartbeat, local_peers


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("is_reaped", [True, False])
def test_a_worker_that_has_ended_is_announced_once(
    monkeypatch, capsys, sleeper, is_first, is_reaped
):
    monkeypatch.setattr(local_peers, "LOOK_SECONDS", 0.02)
    announced = []

    def announce(error, store):
        announced.append(str(error))
        return is_first

    world = SimpleNamespace(size=3, key_value_store=lambda: None, announce_failure=announce)
    peers = {0: psutil.Process(), 2: psutil.Process(sleeper.pid)}
    is_over = threading.Event()
    watch = threading.Thread(target=local_peers._watch, args=(world, peers, is_over))
    watch.start()
    try:
        watch.join(0.2)
        assert watch.is_alive()
        assert announced == []
        sleeper.kill()
        if is_reaped:
            sleeper.wait()
        watch.join(30)
        assert not watch.is_alive()
    finally:
        is_over.set()
    (message,) = announced
    assert message.startswith(f"worker 2 of 3 has ended (process {sleeper.pid})")
    assert capsys.readouterr().err == (f"ekfac-dist: error: {message}\n" if is_first else "")


def test_others_are_told_before_the_heartbeat_ends_a_process(monkeypatch):
    told, ended = [], []
    monkeypatch.setattr(heartbeat.os, "_exit", ended.append)

    def fails(sentence):
        raise OSError(sentence)

    with heartbeat.last_words(fails), heartbeat.last_words(told.append):
        heartbeat._exit(1, "worker 1 of 2 was lost")
    heartbeat._exit(1, "nobody is told any more")
    assert told == ["worker 1 of 2 was lost"]
    assert ended == [1, 1]
