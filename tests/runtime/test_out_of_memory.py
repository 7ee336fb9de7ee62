"""Memory that runs out is a sentence with exit status 2, wherever it does."""

from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist
from helpers.networks import build, examples
from helpers.workshop import run_cli, run_here, save_tiny_llama, texts, write_jsonl

from ekfac_dist import estimate_factors, influence_scores
from ekfac_dist.errors import ConfigError, OutOfMemory, PeerError
from ekfac_dist.fit.refit import LambdaSums
from ekfac_dist.influence import for_python
from ekfac_dist.passes import step_memory
from ekfac_dist.runtime import peers
from ekfac_dist.runtime.out_of_memory import saying_what_would_do
from ekfac_dist.runtime.processes import World

TORCH = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.15 GiB of "
    "which 1.06 GiB is free. Including non-PyTorch memory, this process has 78.08 GiB in use."
)
NCCL = "unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'\n"
QUOTED = TORCH.rpartition(". Including")[0]


def runs_out(*_: object, **__: object) -> NoReturn:
    raise torch.OutOfMemoryError(TORCH)


@pytest.mark.parametrize(
    ("error", "quoted"),
    [
        (torch.OutOfMemoryError(TORCH), QUOTED),
        (MemoryError(), "MemoryError"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate()`"),
            "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate()`",
        ),
        (
            dist.DistBackendError(NCCL),
            "Cuda failure 2 'out of memory'",
        ),
    ],
)
def test_each_way_in_which_memory_runs_out_is_said(error: Exception, quoted: str):
    with pytest.raises(OutOfMemory, match="batch_tokens") as caught, saying_what_would_do():
        raise error
    assert f"Memory ran out ({quoted}). Give a smaller" in str(caught.value)
    assert caught.value.status == 2


def test_the_hosts_own_memory_is_meant_too():
    said = pytest.raises(OutOfMemory, match=r"DefaultCPUAllocator: .*tried to allocate 4000")
    with said, saying_what_would_do():
        torch.empty(10**15)


def test_another_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="size of tensor"), saying_what_would_do():
        torch.ones(2) + torch.ones(3)


def test_in_a_collective_it_is_no_lost_worker(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "default_store", dist.HashStore)
    world = World(0, 2, 0, torch.device("cpu"), "nccl")
    with pytest.raises(OutOfMemory), world._collective():
        raise dist.DistBackendError(NCCL)
    with pytest.raises(PeerError), world._collective():
        raise dist.DistBackendError("Last error: socketPollConnect")


def options(tmp_path: Path) -> list[str | Path]:
    model = save_tiny_llama(tmp_path / "model")
    data = write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in texts(8)])
    return ["--model.name", model, "--data.source", data, "--output", tmp_path / "factors"]


def test_the_command_line_says_it_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LambdaSums, "__init__", runs_out)
    done = run_here(["estimate", *options(tmp_path)])
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ekfac-dist: error: Memory ran out ({QUOTED}). Give a smaller")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_many_workers_say_it_once_and_name_the_one(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Patch:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'ekfac_dist.passes.one_pass' and os.environ.get('RANK') == '1':\n"
        "            import torch\n"
        "            def runs_out(*_, **__):\n"
        f"                raise torch.OutOfMemoryError({TORCH!r})\n"
        "            import ekfac_dist.fit.refit as refit\n"
        "            refit.LambdaSums.__init__ = runs_out\n"
        "sys.meta_path.insert(0, Patch())\n"
    )
    env = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    done = run_cli(["estimate", *options(tmp_path)], workers=2, env=env)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: worker 1 of 2: Memory ran out (CUDA out of memory.") == 1
    assert "Traceback" not in done.stderr


def test_from_python_it_is_a_user_error(monkeypatch: pytest.MonkeyPatch):
    factors = estimate_factors(build("llama"), examples(4))
    monkeypatch.setattr(LambdaSums, "__init__", runs_out)
    with pytest.raises(OutOfMemory):
        estimate_factors(build("llama"), examples(4))
    monkeypatch.setattr(for_python, "compute_scores", runs_out)
    with pytest.raises(OutOfMemory):
        influence_scores(build("llama"), factors, examples(1), examples(4))


# -- before the passes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"partitions": 1, "shard": 1, "gradient_checkpointing": False},
            r"one partition needs .* in steps of \d+ tokens\. Give more factors\.partitions than "
            r"1, or auto, or factors\.shard: auto, or model\.gradient_checkpointing: auto; or",
        ),
        ({"partitions": 2}, "the largest of 2 partitions needs"),
        ({}, "no number of partitions fits"),
    ],
)
def test_partitions_that_do_not_fit_are_refused_before_the_first_pass(
    monkeypatch: pytest.MonkeyPatch, settings: dict, said: str
):
    monkeypatch.setattr(step_memory, "available_bytes", lambda device: 5000)
    monkeypatch.setattr("ekfac_dist.fit.fit_factors.GroupFit", runs_out)
    with pytest.raises(ConfigError, match=said):
        estimate_factors(build("llama"), examples(4), **settings)
