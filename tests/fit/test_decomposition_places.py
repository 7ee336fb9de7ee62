"""Factors that a GPU cannot decompose are told, or refused, before any pass and by the plan."""

import math

import pytest
import torch
from helpers.networks import build, examples
from helpers.workshop import logged

from ekfac_dist import estimate_factors
from ekfac_dist.curvature.eigenbasis import check_size
from ekfac_dist.errors import DecompositionError
from ekfac_dist.fit import decomposition_places, fit_factors
from ekfac_dist.fit.decomposition_places import check_decompositions
from ekfac_dist.fit.plan import Plan
from ekfac_dist.runtime.processes import World

CUDA = torch.device("cuda")
GB = 10**9


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> World:
    """A worker on a GPU of 80 GB with CUDA 12.8."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(decomposition_places, "total_bytes", lambda device: 80 * GB)
    return World(0, 1, 0, CUDA, "none")


def test_a_factor_that_is_left_to_the_cpu_is_told_with_its_time(gpu: World):
    with logged() as lines:
        check_decompositions({"a": 22_999, "b": 28_672, "c": 28_672}, gpu)
    (line,) = lines
    assert line.startswith(
        "decomposition of factors with n = 28672 on the CPU: CUDA 12.8 cannot decompose n ≥ 23000. "
        "About "
    )
    assert "factors.blocks" in line
    assert "factors.eigen: sharded" in line


def test_with_too_little_memory_too(gpu: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(decomposition_places, "total_bytes", lambda device: 24 * GB)
    with logged() as lines:
        check_decompositions({"a": 22_000, "b": 28_672}, gpu)
    assert [line.partition("About")[0] for line in lines] == [
        "decomposition of factors with n = 28672 on the CPU: the GPU has no room. "
    ]


@pytest.mark.parametrize(
    ("cuda", "memory", "said"),
    [
        ("12.8", math.inf, r"nor can CUDA 12\.8 n ≥ 23000; run worker 0 with a torch for CUDA 13"),
        ("13.0", 50 * GB, r"the GPU has 50\.0 GB of the 76\.8 GB .* a larger GPU, give"),
    ],
)
def test_what_neither_gpu_nor_cpu_can_decompose_is_refused(cuda: str, memory: float, said: str):
    with pytest.raises(DecompositionError, match=rf"n = 40000.*{said}.*factors\.blocks"):
        check_size("f", 40_000, CUDA, cuda=cuda, device_bytes=memory)
    check_size("f", 40_000, CUDA, cuda="13.0", device_bytes=80 * GB)


def test_a_fit_is_refused_before_its_first_pass(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ekfac_dist.curvature.eigenbasis.MAX_CPU_SIZE", 5)
    monkeypatch.setattr(fit_factors, "GroupFit", None)
    with pytest.raises(DecompositionError, match=r"run worker 0 on a GPU, give factors\.blocks"):
        estimate_factors(build("llama"), examples(4))


@pytest.mark.parametrize(
    ("cuda", "size", "place"),
    [
        ("12.8", 22_999, "GPU"),
        ("12.8", 28_672, "CPU, as CUDA 12.8 cannot n ≥ 23000"),
        ("13.0", 28_672, "GPU"),
        ("13.0", 32_000, "CPU, as the GPU has no room"),
        ("12.8", 40_000, "neither CPU (n < 32767) nor GPU: give factors.blocks"),
    ],
)
def test_the_plan_says_where_each_size_is_decomposed(
    monkeypatch: pytest.MonkeyPatch, cuda: str, size: int, place: str
):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert Plan._place(size, CUDA, 40 * GB) == place
