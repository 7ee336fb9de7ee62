"""The first half hour on a machine with GPUs: what is there, and whether all of it holds there.

Run with: bash launch/test.sh -m gpu. What needs two GPUs is left out on one, and says so.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.dense import dense_E, relative
from helpers.families import tiny_model
from helpers.long_runs import STAGES, content, wait_for, worker
from helpers.networks import KINDS, build, examples
from helpers.workshop import run_cli, save_tiny_llama, texts, write_jsonl

from ekfac_dist import estimate_factors, influence_scores, load_factors
from ekfac_dist.curvature.eigenbasis import TOLERANCE, decompose
from ekfac_dist.errors import Preempted
from ekfac_dist.influence import device_factors, held

pytestmark = pytest.mark.gpu
HERE = Path(__file__).parent
NUMBER = 60  # sequences


@pytest.fixture(scope="module")
def root(tmp_path_factory, machine) -> Path:
    """A model and data."""
    root = tmp_path_factory.mktemp("gpu")
    save_tiny_llama(root / "model")
    write_jsonl(root / "text.jsonl", [{"text": text} for text in texts(NUMBER)])
    return root


def estimate(root: Path, output: Path, *options: str) -> list[str]:
    return [
        *("estimate", "--model.name", str(root / "model")),
        *("--data.source", str(root / "text.jsonl"), "--output", str(output)),
        *("--batch_tokens", "40", "--save_minutes", "0", *options),
    ]


@pytest.fixture(scope="module")
def alone(root, machine):
    """The store of one worker."""
    done = run_cli(estimate(root, root / "alone"), env=machine.env, timeout=300)
    assert done.returncode == 0, done.stderr
    if machine.kind == "cuda":
        assert "cuda" in done.stdout
    return root / "alone"


def largest_difference(one: Path, other: Path) -> float:
    """The largest relative difference of E of any module of two stores."""
    first, second = load_factors(one), load_factors(other)
    assert first.modules == second.modules
    return max(relative(dense_E(first, name), dense_E(second, name)) for name in first.modules)


# -- what is there ---------------------------------------------------------------------------------


def test_what_is_installed(machine, found):
    parts = [f"Python {sys.version.split()[0]}", f"torch {torch.__version__}"]
    parts += [f"CUDA {torch.version.cuda}", f"{machine.number} × {machine.kind}"]
    if machine.kind == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        parts += [torch.cuda.get_device_name(0), f"{memory:.1f} GB"]
        parts += [f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"]
    found(", ".join(parts))
    assert machine.number > 0


# -- right -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*KINDS, "MixtralForCausalLM", "DeepseekV3ForCausalLM"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-8), ("float32", 1e-3)])
def test_factors_equal_those_of_the_cpu(machine, found, family, dtype, tolerance):
    data, wide = examples(12, prompts=True), getattr(torch, dtype)

    def model():
        return (build(family) if family in KINDS else tiny_model(family)).to(wide)

    settings = {"labels": "data", "accumulate": "float64", "batch_tokens": 24}
    on_cpu = estimate_factors(model(), data, **settings)
    on_device = estimate_factors(model().to(machine.device), data, **settings)
    assert on_cpu.modules == on_device.modules
    worst = max(relative(dense_E(on_device, n), dense_E(on_cpu, n)) for n in on_cpu.modules)
    found(f"E differs by {worst:.1e}")
    assert worst < tolerance


@pytest.mark.parametrize("size", [4096, 14336, 23200])
def test_large_factors_are_decomposed(machine, found, size):
    size = size if machine.kind == "cuda" else size // 64
    rows = torch.randn(size // 2, size, device=machine.device)
    total = (rows.T @ rows).cpu()
    del rows
    start = time.perf_counter()
    basis = decompose("f", total, size // 2, machine.device)
    seconds = time.perf_counter() - start
    found(
        f"n = {size}: {seconds:.1f} s on {basis.device}, attempt {basis.attempts}, residual "
        f"{basis.residual:.1e}, orthogonality {basis.orthogonality:.1e}"
    )
    assert max(basis.residual, basis.orthogonality, basis.trace_error) <= TOLERANCE


def test_packed_sequences_in_bfloat16_have_the_factors_of_lone_ones(machine, found):
    data = examples(24, prompts=True)
    settings = {"labels": "data", "accumulate": "float64"}

    def fit(batch_tokens):
        model = build("llama").to(machine.device, torch.bfloat16)
        return estimate_factors(model, data, batch_tokens=batch_tokens, **settings)

    together, single = fit(400), fit(1)
    worst = max(relative(dense_E(together, n), dense_E(single, n)) for n in single.modules)
    found(f"E of steps of 400 tokens and of lone sequences differ by {worst:.1e}")
    assert worst < 0.1


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_how_much_gradients_depend_on_the_batch(machine, found, dtype):
    wide = getattr(torch, dtype)
    train, queries = examples(12, seed=1, prompts=True), examples(3, seed=2, prompts=True)
    factors = estimate_factors(build("llama"), train, labels="data", accumulate="float64")
    model = build("llama").to(machine.device, wide)

    def scores(batch_tokens):
        options = {"batch_tokens": batch_tokens, "allow_changes": True}
        return influence_scores(model, factors, queries, train, **options).scores

    single = scores(1)
    difference, again = relative(scores(400), single), relative(scores(1), single)
    found(
        f"scores of batches and of lone sequences differ by {difference:.1e}, repeats {again:.1e}"
    )
    assert difference < {"float64": 1e-10, "float32": 1e-3, "bfloat16": 0.3}[dtype]


@pytest.mark.parametrize("room", ["all", "half", "none"])
def test_scores_do_not_depend_on_which_factors_stay_on_the_device(
    machine, found, monkeypatch, room
):
    train, queries = examples(12, seed=1, prompts=True), examples(4, seed=2, prompts=True)
    factors = estimate_factors(build("llama"), train, labels="data", accumulate="float64")
    options = {"batch_tokens": 24, "normalize": "cosine", "top_k": 3}
    expected = influence_scores(build("llama"), factors, queries, train, **options)
    made = []

    class Limited(device_factors.DeviceFactors):
        def __init__(self, factors, device, dtype, budget):
            sizes = {"all": 1e9, "half": 6e3, "none": 0}
            super().__init__(factors, device, dtype, sizes[room])
            made.append(self)

    monkeypatch.setattr(held, "DeviceFactors", Limited)
    model = build("llama").to(machine.device)
    got = influence_scores(model, factors, queries, train, **options)
    found(f"{made[0].num_sent} transfers")
    assert relative(got.scores, expected.scores) < 1e-8


# -- the command line, on one and on two -----------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("multi_gpu.yaml", ()),
        ("multi_gpu.yaml", ("--factors.shard", "2")),
        ("multi_gpu.yaml", ("--factors.eigen", "sharded")),
        ("fsdp.yaml", ()),
        ("fsdp.yaml", ("--factors.shard", "2")),
    ],
)
def test_two_workers_have_the_factors_of_one(machine, found, root, alone, tmp_path, file, options):
    machine.require(2)
    command = machine.command(2, file) + estimate(root, tmp_path / "two", *options)
    done = run_cli(command, env=machine.env, timeout=300)
    assert done.returncode == 0, done.stderr
    difference = largest_difference(tmp_path / "two", alone)
    found(f"E of two workers and of one differ by {difference:.1e}")
    assert difference < 1e-5
    assert "decompose" not in done.stderr  # no word that fewer workers do than could


class Run:
    """A run of two workers that something happens to."""

    def __init__(self, machine, root, output, *options):
        command = machine.command(2) + estimate(root, output, *options)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ekfac_dist", *command],
            env={**os.environ, **machine.env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.output = output

    def until(self, stage):
        assert wait_for(lambda: any(self.output.glob(STAGES[stage])), self.process, 120)

    def ended(self, seconds):
        """What it says, and how long it took to end."""
        start = time.monotonic()
        _, stderr = self.process.communicate(timeout=seconds)
        return stderr, time.monotonic() - start


@pytest.fixture
def run(machine, root, tmp_path):
    machine.require(2)
    started = []

    def begin(*options):
        started.append(Run(machine, root, tmp_path / "two", *options))
        return started[-1]

    yield begin
    for each in started:
        for rank in (0, 1):
            if each.process.poll() is None and (lost := worker(each.process, rank)) is not None:
                lost.kill()
        each.process.kill()


@pytest.mark.parametrize("shard", ["1", "2"])
def test_a_killed_worker_is_named(found, run, shard):
    two = run("--factors.shard", shard)
    two.until("covariance")
    worker(two.process, 1).kill()
    stderr, seconds = two.ended(90)
    said = re.findall(r"ekfac-dist: error: (.*)", stderr)
    found(f"after {seconds:.1f} s: {said[-1:]}")
    assert seconds < 60
    assert any("worker 1" in line and "SIGKILL" in line for line in said), stderr


@pytest.mark.parametrize("shard", ["1", "2"])
def test_a_stopped_worker_is_named(found, run, shard):
    two = run("--factors.shard", shard)
    two.until("covariance")
    worker(two.process, 1).suspend()
    stderr, seconds = two.ended(120)
    said = re.findall(r"ekfac-dist: error: (.*)", stderr)
    named = [line for line in said if "worker 1 of 2 has not answered" in line]
    found(f"after {seconds:.1f} s: {named[:1]}")
    assert named, stderr


def test_sigterm_in_the_refit_is_gone_on_with(machine, found, root, alone, run, tmp_path):
    two = run()
    two.until("refit")
    two.process.send_signal(signal.SIGTERM)
    stderr, seconds = two.ended(90)
    assert two.process.returncode == Preempted.status, stderr
    command = machine.command(2) + estimate(root, two.output)
    assert run_cli(command, env=machine.env, timeout=300).returncode == 0
    whole = machine.command(2) + estimate(root, tmp_path / "whole")
    assert run_cli(whole, env=machine.env, timeout=300).returncode == 0
    same = content(two.output) == content(tmp_path / "whole")
    difference = largest_difference(two.output, alone)
    found(f"ended after {seconds:.1f} s; {'the same' if same else 'other'} bytes, {difference:.1e}")
    assert difference < 1e-5


@pytest.mark.parametrize("victim", [0, 1])
def test_an_index_out_of_range_on_one_worker_ends_both_with_the_cause(
    machine, found, root, tmp_path, victim
):
    machine.require(2)
    start = time.monotonic()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", machine.launcher(2), HERE / "worker_out_of_range.py", str(victim)),
            *estimate(root, tmp_path / "store"),
        ],
        env={**os.environ, **machine.env},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    said = re.findall(r"(.*(?:out of range|device-side assert).*)", done.stderr)
    found(f"after {time.monotonic() - start:.0f} s: {said[:1]}")
    assert done.returncode != 0
    assert said, done.stderr


def test_more_workers_than_gpus_are_refused(machine, found, root, tmp_path):
    machine.require_gpu()
    command = machine.command(machine.number + 1) + estimate(root, tmp_path / "store")
    done = run_cli(command, env=machine.env, timeout=120)
    said = re.findall(r"ekfac-dist: error: (.*)", done.stderr)
    found(f"status {done.returncode}: {said[-1:]}")
    assert done.returncode == 2
    assert "GPU" in said[-1]


def test_memory_that_runs_out_is_a_sentence(machine, found, root, tmp_path):
    machine.require_gpu()
    command = [sys.executable, HERE / "worker_out_of_memory.py", *estimate(root, tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    said = re.findall(r"ekfac-dist: error: (.*)", done.stderr)
    found(f"status {done.returncode}: {said[-1:]}")
    assert done.returncode == 2, done.stderr
    assert "batch_tokens" in said[-1]
