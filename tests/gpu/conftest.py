"""The machine that GPU tests run on, and the line in which each says what it found.

    bash launch/test.sh -m gpu                        on the GPUs of this machine
    EKFAC_DIST_REHEARSAL=1 bash launch/test.sh -m gpu    the tests themselves, on the CPU

A rehearsal takes two CPU workers for two GPUs, and leaves out what only a GPU can show.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from helpers.workshop import cpu_launcher_config, write_yaml

LAUNCHERS = Path(__file__).parents[2] / "launch" / "accelerate"


@dataclass(frozen=True)
class Machine:
    """The devices that tests use.

    Attributes:
        kind: "cuda", or "cpu" in a rehearsal.
        number: How many there are.
        folder: Where launcher files are written.
    """

    kind: str
    number: int
    folder: Path

    @property
    def device(self) -> torch.device:
        return torch.device(self.kind)

    def require(self, number: int) -> None:
        """Skips a test that needs more devices than there are."""
        if self.number < number:
            pytest.skip(f"needs {number} GPUs; this machine has {self.number}")

    def require_gpu(self) -> None:
        """Skips in a rehearsal what only a GPU can show."""
        if self.kind != "cuda":
            pytest.skip("only a GPU can show this")

    @property
    def env(self) -> dict[str, str]:
        """The environment of the workers."""
        return {"ACCELERATE_USE_CPU": str(self.kind == "cpu").lower(), "OMP_NUM_THREADS": "1"}

    def launcher(self, workers: int, file: str = "multi_gpu.yaml") -> Path:
        """A shipped launcher file, for so many workers."""
        path = self.folder / f"{workers}-{file}"
        content = yaml.safe_load((LAUNCHERS / file).read_text()) | {"num_processes": workers}
        if self.kind == "cpu":
            cpu = yaml.safe_load(cpu_launcher_config(path, workers).read_text())
            content |= {key: cpu[key] for key in ("use_cpu", "gpu_ids")}
        return write_yaml(path, content)

    def command(self, workers: int, file: str = "multi_gpu.yaml") -> list[str]:
        """The command line's words for so many workers."""
        return (
            [] if workers == 1 else ["launch", "--config_file", str(self.launcher(workers, file))]
        )


@pytest.fixture(scope="session")
def machine(tmp_path_factory) -> Machine:
    folder = tmp_path_factory.mktemp("launchers")
    if os.environ.get("EKFAC_DIST_REHEARSAL"):
        return Machine("cpu", 2, folder)
    if not torch.cuda.is_available():
        pytest.skip(f"no CUDA device that torch {torch.__version__} can use")
    return Machine("cuda", torch.cuda.device_count(), folder)


@pytest.fixture
def found(capsys, request):
    """Says in one line what a test found."""

    def say(line: str) -> None:
        with capsys.disabled():
            print(f"\n  {request.node.name}: {line}", flush=True)

    return say
