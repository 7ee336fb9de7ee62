"""Runs on two hosts, made of network namespaces, and on disks that are full. They need root."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml
from helpers.dense import dense_E, relative
from helpers.hosts import ADDRESSES, ip, two_hosts
from helpers.long_runs import STAGES, arguments, content, running, wait_for
from helpers.workshop import run_cli, write_yaml
from test_kills import setting  # a fixture

from ekfac_dist import load_factors

pytestmark = pytest.mark.root
__all__ = ["setting"]  # a fixture
MULTI_NODE = Path(__file__).parents[2] / "launch" / "accelerate" / "multi_node.yaml"


# -- two hosts -------------------------------------------------------------------------------------


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    with two_hosts() as names:
        yield names


def slow_down(host: str, bits_per_second: int) -> None:
    """Limits what a host sends."""
    limit = f"tbf rate {bits_per_second} burst 2000 latency 100s".split()
    subprocess.run(["tc", "-n", host, "qdisc", "add", "dev", "veth", "root", *limit], check=True)


def bytes_on_their_way(host: str) -> int:
    """What a host has sent and the other has not received yet, in the connection with most."""
    listed = subprocess.run(
        ["ip", "netns", "exec", host, "ss", "-Htn"], check=True, capture_output=True, text=True
    )
    return max((int(line.split()[2]) for line in listed.stdout.splitlines()), default=0)


def start(host: str, rank: int, root: Path, output: Path, *settings: str) -> subprocess.Popen[str]:
    config = yaml.safe_load(MULTI_NODE.read_text()) | {"use_cpu": True, "gpu_ids": "-1,-1"}
    file = write_yaml(output.with_name(f"host{rank}.yaml"), config)
    launcher = [sys.executable, "-m", "ekfac_dist", "launch", "--config_file", str(file)]
    launcher += ["--num_machines", "2", "--num_processes", "2"]
    launcher += ["--machine_rank", str(rank), "--main_process_ip", ADDRESSES[0]]
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *launcher, *map(str, arguments(root, output)), *settings],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "GLOO_SOCKET_IFNAME": "veth",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(processes: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    try:
        return [process.communicate(timeout=150) for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_two_hosts_fit_what_one_worker_fits(setting: Path, hosts: list[str], tmp_path: Path):
    done = run_cli(arguments(setting, tmp_path / "alone"))
    assert done.returncode == 0, done.stderr
    processes = [start(host, k, setting, tmp_path / "both") for k, host in enumerate(hosts)]
    said = end(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    assert "2, backend gloo" in said[0][0]
    assert said[1][0] == ""  # worker 0 alone speaks
    alone, both = load_factors(tmp_path / "alone"), load_factors(tmp_path / "both")
    assert both.manifest["data"] == alone.manifest["data"]
    for name in alone.modules:
        assert relative(dense_E(both, name), dense_E(alone, name)) < 1e-6
    assert content(tmp_path / "both") == content(setting / "whole")


def test_a_host_that_is_lost_is_named_and_the_run_goes_on(
    setting: Path, hosts: list[str], tmp_path: Path
):
    store = tmp_path / "both"
    processes = [start(host, k, setting, store) for k, host in enumerate(hosts)]
    assert wait_for(lambda: any(store.glob(STAGES["covariance"])), processes[0])
    processes[1].send_signal(signal.SIGTERM)
    said = end(processes)
    assert all(process.returncode not in (0, None) for process in processes), said
    assert "Traceback" not in said[0][1]
    done = run_cli(arguments(setting, store), workers=2, timeout=120)
    assert done.returncode == 0, done.stderr
    assert content(store) == content(setting / "whole")


@pytest.mark.parametrize("stage", ["covariance", "refit"])
def test_an_owner_that_is_cut_off_is_named_by_the_others_and_the_run_goes_on(
    setting: Path, hosts: list[str], tmp_path: Path, stage: str
):
    store, shared_out = tmp_path / "both", ("--factors.shard", "2")
    whole = run_cli([*arguments(setting, tmp_path / "whole"), *shared_out], workers=2, timeout=120)
    assert whole.returncode == 0, whole.stderr
    processes = [start(host, k, setting, store, *shared_out) for k, host in enumerate(hosts)]
    assert wait_for(lambda: any(store.glob(STAGES[stage])), processes[0])
    for host in hosts:  # more waits than a beat, or what else workers tell each other: rows
        slow_down(host, 16_000)
    assert wait_for(lambda: min(map(bytes_on_their_way, hosts)) > 1000, processes[0])
    ip("-n", hosts[1], "link", "set", "veth", "down")
    cut = time.monotonic()
    said = end(processes)
    assert time.monotonic() - cut < 60
    assert all(process.returncode not in (0, None) for process in processes), said
    sentences = re.findall(r"ekfac-dist: error: (.*)", said[0][1])
    assert any("worker 1 of 2 has not answered" in line for line in sentences), said
    assert "The host of the workers' key-value store does not answer" in said[1][1]
    assert not any("Traceback" in stderr for _, stderr in said)
    done = run_cli([*arguments(setting, store), *shared_out], workers=2, timeout=120)
    assert done.returncode == 0, done.stderr
    assert content(store) == content(tmp_path / "whole")


# -- full disks ------------------------------------------------------------------------------------


@contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)], check=True
    )
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(path: Path) -> Path:
    ballast = path / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    return ballast


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_fills_up_ends_a_run_with_a_sentence_and_it_goes_on(
    setting: Path, tmp_path: Path, stage: str
):
    with small_disk(tmp_path / "disk", 20) as disk:
        store = disk / "store"
        with running(setting, store) as process:
            assert wait_for(lambda: any(store.glob(STAGES[stage])), process)
            ballast = fill(disk)
            _, stderr = process.communicate(timeout=60)
        assert process.returncode == 2, stderr
        assert "Traceback" not in stderr
        sentence = re.findall(r"ekfac-dist: error: (.*)", stderr)
        assert len(sentence) == 1
        assert re.search("No space left|are free", sentence[0])
        ballast.unlink()
        done = run_cli(arguments(setting, store), workers=2, timeout=120)
        assert done.returncode == 0, done.stderr
        assert content(store) == content(setting / "whole")


def test_a_disk_that_is_too_small_is_told_before_the_work(setting: Path, tmp_path: Path):
    with small_disk(tmp_path / "disk", 1) as disk:
        fill(disk).rename(disk / "mine")
        os.truncate(disk / "mine", 2**20 - 24_576)
        done = run_cli(arguments(setting, disk / "store"))
        assert done.returncode == 2
        assert re.search(r"covariance stage needs .* are free. Free some", done.stderr)
        os.truncate(disk / "mine", 0)
        assert not json.loads((disk / "store" / "manifest.json").read_text())["complete"]
