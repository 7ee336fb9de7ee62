import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from helpers.workshop import cpu_launcher_config, run_cli

from ekfac_dist.errors import ConfigError
from ekfac_dist.runtime import launcher


@pytest.mark.parametrize(("cores", "workers", "threads"), [(2, 2, 1), (8, 3, 2), (2, 4, 1)])
def test_workers_share_the_cores(monkeypatch, tmp_path, cores, workers, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    options = SimpleNamespace(
        config_file=str(cpu_launcher_config(tmp_path / "a.yaml", workers)),
        num_processes=None,
        num_machines=None,
        num_cpu_threads_per_process=None,
    )
    launcher._complete_options(options)
    assert options.num_cpu_threads_per_process == threads
    assert os.environ["ACCELERATE_USE_CPU"] == "true"


def test_a_launch_without_a_command_is_refused():
    with pytest.raises(ConfigError, match="no command to run"):
        launcher.launch_workers(["--num_processes", "2"])


def test_an_option_that_the_launcher_does_not_know_is_told_in_a_sentence():
    with pytest.raises(ConfigError, match="launcher refuses"):
        launcher.launch_workers(["--num_processes", "two", "estimate"])


def test_a_configuration_that_does_not_exist_is_named():
    done = run_cli(["launch", "--config_file", "nowhere.yaml", "estimate"])
    assert done.returncode == 2
    assert "nowhere.yaml" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_polite_end_of_the_launcher_ends_its_workers_without_a_traceback(tmp_path):
    fifo = tmp_path / "never.yaml"
    os.mkfifo(fifo)  # workers wait here for a configuration that nobody writes
    command = [sys.executable, "-m", "ekfac_dist", "launch"]
    command += ["--config_file", cpu_launcher_config(tmp_path / "a.yaml", 2)]
    process = subprocess.Popen(
        [*map(str, command), "estimate", "--config", str(fifo)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(8)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in stderr
    assert "ended by SIGTERM" in stderr
