"""Other operating systems: what they lack is taken away here, for want of the systems."""

import os
import subprocess
import sys

import pytest
import torch
from helpers.workshop import run_here, save_tiny_llama, texts, write_jsonl

from ekfac_dist import cli
from ekfac_dist.runtime import platforms
from ekfac_dist.runtime.processes import World

# What CPython's documentation says is for Unix alone, of what this package uses.
AS_ON_WINDOWS = """
import importlib.abc, os, signal, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("resource", "fcntl", "pwd"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import datasets, psutil, torch, transformers  # have builds for Windows, and are not what is tried
sys.meta_path.insert(0, Missing())
for name in ("resource", "fcntl", "pwd"):
    sys.modules.pop(name, None)
del signal.SIGPIPE, os.sched_getaffinity
from ekfac_dist import cli
from ekfac_dist.runtime import platforms
class Windows:
    name = "nt"
platforms.os = Windows
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["plan", "estimate", "query", "report", "launch", "demo"])
def test_on_windows_what_cannot_run_says_so_at_once(command, monkeypatch, capsys):
    class Windows:
        name = "nt"

    monkeypatch.setattr(platforms, "os", Windows)
    assert cli.main([command]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"ekfac-dist: error: `ekfac-dist {command}` does not run on Windows")
    assert "WSL 2" in said


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    directory = tmp_path_factory.mktemp("store")
    model = save_tiny_llama(directory / "model")
    data = write_jsonl(directory / "rows.jsonl", [{"text": text} for text in texts(4)])
    fit = ["estimate", "--model.name", model, "--data.source", data]
    done = run_here([*fit, "--output", directory / "factors"])
    assert done.returncode == 0, done.stderr
    return directory / "factors"


def test_inspect_needs_nothing_that_windows_lacks(store):
    command = [sys.executable, "-c", AS_ON_WINDOWS, "inspect", str(store)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "down_proj" in done.stdout


def test_on_macos_workers_share_all_cpus(monkeypatch):
    assert platforms.num_cpus() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert platforms.num_cpus() == os.cpu_count()


def test_an_accelerator_that_is_not_cudas_is_not_used(monkeypatch):
    """Apple's is one to torch, and knows no float64."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert World.start().device == torch.device("cpu")


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (
            "processor\t: 0\nmodel name\t: AMD EPYC 9B45 : 2\nmodel name\t: other\n",
            "AMD EPYC 9B45 : 2",
        ),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", "aarch64"),
        (None, "aarch64"),
    ],
)
def test_the_processor_has_its_name_or_its_architecture(content, name, monkeypatch, tmp_path):
    file = tmp_path / "cpuinfo"
    if content is not None:
        file.write_text(content)
    monkeypatch.setattr(platforms, "_CPU_INFO", file)
    monkeypatch.setattr(platforms.platform, "processor", lambda: "")
    monkeypatch.setattr(platforms.platform, "machine", lambda: "aarch64")
    assert platforms.processor_name() == name
