"""What is free is what the host has, and what the limits around the process leave of it."""

import sys
from pathlib import Path

import pytest
import torch

from ekfac_dist.runtime import memory

GB = 10**9
LAYOUTS = {
    "version 2": ("0::/jobs/7", "", "memory.max", "memory.current", "inactive_file"),
    "version 1": (
        "9:cpu,memory:/jobs/7",
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_narrowest_limit_around_the_process_counts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    line, root, limit, usage, cache = LAYOUTS[name]
    for folder, most, used in (("jobs/7", None, 3 * GB), ("jobs", 5 * GB, 4 * GB)):
        group = tmp_path / root / folder
        group.mkdir(parents=True, exist_ok=True)
        unlimited = "max" if name == "version 2" else str(2**63 - 4096)
        (group / limit).write_text(f"{most or unlimited}\n")
        (group / usage).write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 17\n{cache} {GB}\n")
    monkeypatch.setattr(memory, "_CONTROL_GROUPS", tmp_path)
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda p, **o: line if p == Path("/proc/self/cgroup") else read(p, **o)
    )
    assert memory._left_of_control_groups() == 2 * GB


def test_without_limits_there_is_what_the_host_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_CONTROL_GROUPS", tmp_path)
    assert memory._left_of_control_groups() == sys.maxsize
    assert 10**8 < memory.available_bytes(torch.device("cpu")) < sys.maxsize


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU of 80 GB: others hold 2 GB, this process has 70 GB and uses 30 GB of them."""
    sizes = {"mem_get_info": (8 * GB, 80 * GB), "memory_reserved": 70 * GB}
    for name, size in (sizes | {"memory_allocated": 30 * GB}).items():
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
    return torch.device("cuda", 0)


def test_what_the_allocator_of_a_gpu_keeps_without_using_it_is_free(gpu: torch.device):
    assert memory.available_bytes(gpu) == 48 * GB


def test_what_this_process_holds_is_about_its_peak():
    peak = memory.peak_bytes(torch.device("cpu"))["host"]
    assert 10**8 < memory.own_bytes() < 1.01 * peak  # the kernel counts them in batches


def test_the_disk_of_a_folder_that_is_not_there_yet_is_its_parents(tmp_path: Path):
    assert memory.free_disk_bytes(tmp_path / "a" / "b") == pytest.approx(
        memory.free_disk_bytes(tmp_path), rel=0.1
    )
