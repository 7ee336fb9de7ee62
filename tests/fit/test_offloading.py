"""What leaves a device while factors are decomposed; here the CPU stands for the device."""

import copy
from pathlib import Path

import pytest
import torch
from helpers.killed_fits import content
from helpers.networks import build, examples
from helpers.workshop import logged

from ekfac_dist import estimate_factors
from ekfac_dist.curvature.eigenbasis import MAX_CPU_SIZE, decomposing_device, workspace_bytes
from ekfac_dist.errors import DecompositionError
from ekfac_dist.fit import eigenbasis, offloading, start

CPU, CUDA, META = map(torch.device, ("cpu", "cuda", "meta"))


@pytest.fixture
def as_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's memory counts as a device's own."""
    fingerprints = start.model_fingerprints
    monkeypatch.setattr(offloading, "has_own_memory", lambda device: True)
    # NumPy reads a CPU's weights in place, and then their storages cannot be emptied.
    monkeypatch.setattr(
        start, "model_fingerprints", lambda model, *of: fingerprints(copy.deepcopy(model), *of)
    )


def fit(model: torch.nn.Module, output: Path) -> None:
    estimate_factors(model, examples(9), output=output, batch_tokens=16)


def sizes(model: torch.nn.Module) -> list[int]:
    tensors = [*model.parameters(), *model.buffers()]
    return [tensor.untyped_storage().nbytes() for tensor in tensors]


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2's head is its embedding
def test_weights_leave_the_device_while_factors_are_decomposed_and_come_back(
    family: str, as_a_device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, seen, eigh = build(family), [], torch.linalg.eigh
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    parts = {name: weight[1:] for name, weight in model.named_parameters()}
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: seen.append(sum(sizes(model))) or eigh(a))
    fit(model, tmp_path / "store")
    assert seen
    assert not any(seen)
    assert model.state_dict().keys() == before.keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
    for name, weight in model.named_parameters():
        assert parts[name].untyped_storage()._cdata == weight.untyped_storage()._cdata
        assert torch.equal(parts[name], weight[1:])
    monkeypatch.undo()
    fit(build(family), tmp_path / "plain")
    assert content(tmp_path / "store") == content(tmp_path / "plain")


def test_weights_come_back_if_a_decomposition_fails(
    as_a_device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(matrix: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    model = build("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.raises(DecompositionError):
        fit(model, tmp_path / "store")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_sums_and_weights_stay_where_the_host_has_no_room_for_them(
    as_a_device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, seen, eigh = build("llama"), [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: seen.append(min(sizes(model))) or eigh(a))
    monkeypatch.setattr(offloading, "available_bytes", lambda device: 1000)
    with logged() as lines:
        fit(model, tmp_path / "store")
    assert all(seen)
    assert any("stay on the devices" in line and "1.0 kB are free" in line for line in lines)


@pytest.mark.parametrize(
    ("size", "device", "room", "cuda", "wanted"),
    [
        (100, CPU, 0, None, CPU),
        (100, CUDA, 1, "12.8", CUDA),
        (100, CUDA, 0.9, "12.8", CPU),
        (22_999, CUDA, 1, "12.8", CUDA),
        (23_000, CUDA, 1, "12.8", CPU),
        (28_672, CUDA, 1, "13.0", CUDA),
        (28_672, CUDA, 0.9, "13.0", CPU),
        (28_672, CUDA, 1, None, CUDA),
        (MAX_CPU_SIZE + 1, CUDA, 0.9, "13.0", CUDA),  # a CPU cannot
    ],
)
def test_a_factor_is_decomposed_where_there_is_room_and_a_library_that_can(
    size: int, device: torch.device, room: float, cuda: str | None, wanted: torch.device
):
    assert decomposing_device(size, device, room * workspace_bytes(size), cuda) == wanted


def test_the_largest_factor_of_a_70b_model_needs_40_gb():
    assert workspace_bytes(28_672) == pytest.approx(39.5e9, rel=0.01)


@pytest.mark.parametrize(
    ("free", "why"),
    [(100, r"it needs 768 B there, 100 B are free"), (1000, "it failed there")],
)
def test_a_factor_that_its_device_cannot_decompose_is_decomposed_on_the_cpu_and_that_is_said(
    free: int, why: str, monkeypatch: pytest.MonkeyPatch
):
    """The meta device stands for the GPU: it computes nothing."""
    monkeypatch.setattr(eigenbasis, "free_bytes", lambda device: free)
    matrix = torch.diag(torch.arange(1.0, 5.0))
    _, header, lines = eigenbasis._decompose("f", [matrix], 2, META)
    assert header["count"] == "2"
    assert torch.equal(matrix, torch.eye(4))  # its eigenvectors
    assert lines == [f"decomposition f (n = 4) on the cpu instead of meta: {why}"]
