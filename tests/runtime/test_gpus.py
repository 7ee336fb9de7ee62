"""Workers on GPUs, with stand-ins for GPUs, driver and NCCL: what is wrong is told at the start."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.workshop import run_here

from ekfac_dist.errors import LaunchError, ModelError, PeerError
from ekfac_dist.runtime import gpus, groups, launcher, peers, processes
from ekfac_dist.runtime.processes import World

LAUNCHERS = Path(__file__).parents[2] / "launch" / "accelerate"
OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version from the URL."
)
CUDA = torch.device("cuda", 1)


def worker(**changes: object) -> World:
    usual = {"rank": 0, "size": 2, "local_rank": 0, "device": CUDA, "backend": "nccl"}
    return World(**usual | changes)


@pytest.fixture
def nccl_says(monkeypatch: pytest.MonkeyPatch):
    """A store without announced failures, and what each collective then comes to."""
    monkeypatch.setattr(peers, "default_store", dist.HashStore)

    def says(message: str, kind: type[Exception] = dist.DistBackendError) -> None:
        def fail(*_: object, **__: object) -> None:
            raise kind(message)

        for name in ("all_reduce", "all_gather_object", "broadcast"):
            monkeypatch.setattr(dist, name, fail)

    return says


# -- GPUs that cannot be used ----------------------------------------------------------------------


@pytest.fixture
def old_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A torch for CUDA 12.8, on a driver that is too old for it."""

    def init() -> None:
        raise RuntimeError(OLD)

    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13\n")
    monkeypatch.setattr(gpus, "_DRIVER", version)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", init)


NAMED = r"built for CUDA 12\.8, and the driver is 470\.57\.02 \(The NVIDIA driver .* is too old"


@pytest.fixture
def starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher would fail where it starts workers."""
    monkeypatch.setattr("accelerate.commands.launch.launch_command", None)


@pytest.mark.usefixtures("old_driver", "starts_nothing")
@pytest.mark.parametrize("name", ["one_gpu", "multi_gpu", "multi_node", "fsdp"])
def test_a_launcher_file_for_gpus_without_a_usable_one_is_an_error(name: str):
    file = LAUNCHERS / f"{name}.yaml"
    done = run_here(["launch", "--config_file", file, "estimate", "--config", "none.yaml"])
    assert done.returncode == 2
    assert f"{name}.yaml asks for GPUs, and none can be used: torch" in done.stderr
    assert "CUDA 12.8, and the driver is 470.57.02 (The NVIDIA driver on your" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_torch_for_the_cpu_is_named_too():
    with pytest.raises(LaunchError, match=r"is built for the CPU alone, and there is no NVIDIA"):
        gpus.require_usable_gpu("multi_gpu.yaml")


@pytest.mark.usefixtures("old_driver")
@pytest.mark.parametrize(
    "wish", [{}, {"ACCELERATE_USE_CPU": "true"}, {"CUDA_VISIBLE_DEVICES": "-1,-1"}]
)
def test_workers_that_did_not_ask_for_the_cpu_do_not_run_on_it(
    monkeypatch: pytest.MonkeyPatch, wish: dict[str, str]
):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in {"WORLD_SIZE": "2", **wish}.items():
        monkeypatch.setenv(name, value)

    def started(**_: object) -> None:
        raise ValueError("would have started")

    monkeypatch.setattr(processes, "PartialState", started)
    with pytest.raises(LaunchError, match="would have started" if wish else NAMED):
        World.start()


# -- more workers than GPUs ------------------------------------------------------------------------


@pytest.mark.usefixtures("starts_nothing")
def test_a_launcher_file_for_more_workers_than_gpus_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    done = run_here(["launch", "--config_file", LAUNCHERS / "multi_gpu.yaml", "estimate"])
    assert done.returncode == 2
    assert "multi_gpu.yaml starts 8 workers on this machine, which has 4 GPUs" in done.stderr
    launcher._require_gpus("multi_node.yaml", 4)


def test_workers_that_share_a_gpu_are_named_before_their_first_collective(
    monkeypatch: pytest.MonkeyPatch, nccl_says
):
    nccl_says("Duplicate GPU detected")
    seen = [("a", "GPU-1", 2), ("a", "GPU-2", 2), ("b", "GPU-3", 1), ("b", "GPU-3", 1)]
    monkeypatch.setattr(gpus, "identity", lambda device: ("GPU-1", 2))
    gathered: list[object] = [seen, [(True, None)] * 4]
    monkeypatch.setattr(World, "gather", lambda world, value: gathered.pop(0))
    with pytest.raises(
        LaunchError,
        match=r"Workers 2 and 3 share a GPU: b has 2 workers, of which each sees 1 GPU\. Start as",
    ):
        worker(size=4).meet()


def test_workers_that_each_see_one_gpu_alone_do_not_share_it():
    gpus.require_own_gpus([("a", "GPU-1", 1), ("a", "GPU-2", 1)])


def test_a_first_collective_that_fails_is_no_lost_worker(
    monkeypatch: pytest.MonkeyPatch, nccl_says
):
    nccl_says("NCCL error, NCCL version 2.27\nLast error:\nDuplicate GPU detected : rank 1")
    monkeypatch.setattr(gpus, "identity", lambda device: ("", 0))
    monkeypatch.setattr(World, "gather", lambda world, value: [value])
    with pytest.raises(LaunchError, match=r"through NCCL: Duplicate GPU detected : rank 1\. Look"):
        worker(device=torch.device("meta")).meet()


# -- control messages ------------------------------------------------------------------------------


def state(**attributes: object) -> SimpleNamespace:
    usual = {"num_processes": 2, "process_index": 1, "local_process_index": 1, "device": CUDA}
    return SimpleNamespace(**usual | attributes)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A host with two GPUs and a launcher of two workers; what the process group is made with."""
    made: dict[str, object] = {}
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("TORCH_NCCL_RETHROW_CUDA_ERRORS", "set for its restoration")
    monkeypatch.delenv("TORCH_NCCL_RETHROW_CUDA_ERRORS")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(processes, "PartialState", lambda **given: made.update(given) or state())
    monkeypatch.setattr(dist, "get_backend_config", lambda: str(made.get("backend", "cuda:nccl")))
    return made


def test_workers_on_gpus_tell_each_other_things_through_gloo(two_gpus: dict[str, object]):
    world = World.start()
    assert two_gpus["backend"] == "cpu:gloo,cuda:nccl"
    assert two_gpus["cpu"] is False
    assert world.backend == "nccl"
    assert world.control is None  # the default group does both
    # NCCL's thread leaves it to the main thread to say what failed on the GPU.
    assert os.environ["TORCH_NCCL_RETHROW_CUDA_ERRORS"] == "0"


def test_where_a_script_has_made_a_group_of_nccl_alone_there_is_one_of_gloo_beside_it(
    two_gpus: dict[str, object], monkeypatch: pytest.MonkeyPatch
):
    made = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "new_group", lambda **given: made.append(given) or "gloo's")
    groups._new_control_group.cache_clear()
    try:
        first, second = World.start(), World.start()
    finally:
        groups._new_control_group.cache_clear()
    assert "backend" not in two_gpus
    assert first.control == second.control == "gloo's"
    assert made == [{"backend": "gloo", "timeout": groups.COLLECTIVE_TIMEOUT}]


def test_objects_and_tensors_of_the_cpu_take_the_control_group(monkeypatch: pytest.MonkeyPatch):
    took = []
    work = SimpleNamespace(wait=lambda: None)
    for name in ("broadcast", "all_reduce"):
        monkeypatch.setattr(
            dist, name, lambda t, group=None, **_: took.append((str(t.device), group)) or work
        )
    monkeypatch.setattr(dist, "all_gather_object", lambda o, v, group: took.append(("", group)))
    monkeypatch.setattr(
        dist, "broadcast_object_list", lambda o, group, **_: took.append(("", group))
    )
    monkeypatch.setattr(dist, "send_object_list", lambda o, dst, group: took.append(("", group)))
    world = worker(control="gloo's", device=torch.device("meta"))
    world.gather(None)
    world.share(None)
    world.moved({}, 0, 1)
    world.begin_sum([1, 2])()
    for device in ("cpu", "meta"):
        world.broadcast_(torch.zeros(2, device=device))
        world.all_reduce_([torch.zeros(2, device=device)])
    of_objects, of_tensors = took[:4], took[4:]
    assert of_objects == [("", "gloo's")] * 3 + [("cpu", "gloo's")]
    assert of_tensors == [("cpu", "gloo's")] * 2 + [("meta", None)] * 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (torch.AcceleratorError, "CUDA error: device-side assert triggered"),
        (RuntimeError, "CUDA error: an illegal memory access was encountered"),
        (dist.DistBackendError, "Last error:\nCuda failure 700 'an illegal memory access was …'"),
    ],
)
def test_a_failed_gpu_is_said_by_its_own_worker_and_is_no_lost_connection(
    nccl_says, kind: type[Exception], message: str
):
    nccl_says(message, kind)
    with pytest.raises(kind) as caught:
        worker().broadcast_(torch.zeros(2))
    assert message in str(caught.value)
    assert worker()._cause_of(caught.value) is caught.value
    nccl_says("Connection closed by peer")
    with pytest.raises(PeerError, match="connection to another worker was lost"):
        worker().broadcast_(torch.zeros(2))


# -- the model's device ----------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["cpu", "cuda:0"])
def test_a_model_that_is_not_on_its_workers_gpu_is_refused(place: str):
    said = rf"The model is on {place}, .* \(NCCL\).*model\.to\('cuda:1'\)"
    with pytest.raises(ModelError, match=said):
        worker().at(torch.device(place))
    assert worker().at(CUDA).device == CUDA
    assert worker(backend="gloo").at(torch.device("cpu")).device.type == "cpu"
