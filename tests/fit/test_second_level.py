"""float32 sums over very many sequences: as float64 sums, in fits of every kind, saved and not."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.dense import dense_E, dense_modules, relative
from helpers.killed_fits import FITS, content, ends_with_the_same_bytes, fit, killed_at
from helpers.networks import build, examples, shifted
from helpers.workshop import run_workers
from safetensors import safe_open

from ekfac_dist import estimate_factors, load_factors
from ekfac_dist.config import FactorsConfig
from ekfac_dist.curvature import long_sums
from ekfac_dist.errors import Preempted
from ekfac_dist.factors.layout import STATE
from ekfac_dist.fit import checkpoints
from ekfac_dist.fit.arrangement import Limits, arrange
from ekfac_dist.fit.covariance import CovarianceSums
from ekfac_dist.fit.disk_space import stage_bytes
from ekfac_dist.fit.eigenbasis import Basis
from ekfac_dist.fit.refit import LambdaSums
from ekfac_dist.fit.sizes import WorkerShare
from ekfac_dist.fit.worker_memory import memory
from ekfac_dist.models.capture.saved_tensors import StepMemory
from ekfac_dist.models.modules import LINEAR, TrackedModule
from ekfac_dist.passes.owners import NOT_SHARED
from ekfac_dist.runtime import preemption

HERE = Path(__file__).parent
CPU = torch.device("cpu")
MODULE = TrackedModule("m", LINEAR, 2, 1, False, "m.input", "m.output")
MIXED = ("llama", "gpt2")


def batch_of(lengths: tuple[int, ...]) -> SimpleNamespace:
    return SimpleNamespace(
        lengths=lengths, num_positions=sum(lengths), real=None, sender=0, are_copies=False
    )


def lambda_sums(module: TrackedModule) -> LambdaSums:
    bases = {
        factor: Basis([torch.eye(size)], torch.ones(size).double())
        for factor, size in (
            (module.input, module.input_size),
            (module.output, module.num_outputs),
        )
    }
    return LambdaSums([module], bases, per_token=False, dtype=torch.float32, device=CPU)


@pytest.fixture
def frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are flushed within the few sequences that a test has."""
    monkeypatch.setattr(long_sums, "FLUSH_AFTER", 4)


# -- very many terms -------------------------------------------------------------------------------


def test_ten_million_sequences_are_summed_with_little_bias(monkeypatch: pytest.MonkeyPatch):
    generator, exact, plain = np.random.default_rng(0), np.zeros(2), np.zeros(2, np.float32)

    def add_squares(lambda_OI, acts_MI, grads_MO, lengths, **bases):
        """What adding one sequence after the other does, for squares that are drawn."""
        drawn = np.square(generator.standard_normal((2, len(lengths)), dtype=np.float32))
        exact[:] += drawn.sum(1, dtype=np.float64)
        for total in (lambda_OI[0].numpy(), plain):
            both = np.concatenate([total[:, None], drawn], 1)
            total[:] = np.add.accumulate(both, 1)[:, -1]

    monkeypatch.setattr("ekfac_dist.fit.refit.add_sequence_squares_", add_squares)
    sums, world = lambda_sums(MODULE), SimpleNamespace(all_reduce_=lambda tensors: None)
    acts, grads, batch = torch.zeros(5000, 2), torch.zeros(5000, 1), batch_of((1,) * 5000)
    for _ in range(2000):
        sums.on_input(MODULE, acts, batch)
        sums.on_gradient(MODULE, grads, batch)
    sums.reduce(world)
    assert np.abs(plain / exact - 1).min() > 1e-2
    assert np.abs(sums.sums["m"][0].double().numpy() / exact - 1).max() < 1e-5


def test_the_bias_coordinate_counts_a_thousand_million_positions_exactly(
    monkeypatch: pytest.MonkeyPatch,
):
    def add_ones(sum_nn, rows_Mi, *, bias):
        sum_nn[-1, -1] += len(rows_Mi)

    monkeypatch.setattr("ekfac_dist.fit.covariance.add_outer_products_", add_ones)
    module = TrackedModule("m", LINEAR, 16, 16, True, "m.input", "m.output")
    world = SimpleNamespace(all_reduce_=lambda tensors: None, device=CPU)
    sums, rows = CovarianceSums([module], torch.float32, CPU), torch.ones(1, 1).expand(65_537, 16)
    steps = 15_300
    for _ in range(steps):
        sums.on_input(module, rows, batch_of((65_537,)))
    sums.reduce(world)
    assert sums.counts["m.input"] == 65_537 * steps > 10**9
    assert sums.sums["m.input"][0][-1, -1] == torch.tensor(65_537 * steps, dtype=torch.float32)


# -- fits ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fit_of_many_sequences_is_nearer_to_float64_sums(monkeypatch: pytest.MonkeyPatch):
    model, data = build("llama").float(), examples(200, longest=3) * 60
    settings = {"labels": "data", "batch_tokens": 4096}
    exact = estimate_factors(model, data, accumulate="float64", **settings)

    def errors() -> dict[str, float]:
        factors = estimate_factors(model, data, **settings)
        return {
            name: relative(
                factors.module(name).lambda_OI.sum().double(),
                exact.module(name).lambda_OI.sum(),
            )
            for name in exact.modules
        }

    two_levels = errors()
    monkeypatch.setattr(long_sums, "FLUSH_AFTER", 10**9)
    one_level = errors()
    print(two_levels, one_level)


@pytest.mark.usefixtures("frequent")
@pytest.mark.parametrize("family", MIXED)
@pytest.mark.parametrize("refit", ["per_sequence", "per_token"])
def test_a_fit_with_flushes_equals_dense_autograd(family: str, refit: str):
    model, data = build(family), examples(prompts=True)
    factors = estimate_factors(
        model, data, labels="data", refit=refit, accumulate="float32", batch_tokens=24
    )
    oracle = dense_modules(model, [shifted(e) for e in data], list(factors.modules))
    for name, dense in oracle.items():
        assert relative(dense_E(factors, name), dense.E(refit == "per_token")) < 1e-5


def test_a_short_run_has_one_level(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    flushed: list[torch.Tensor] = []
    add_exactly_ = long_sums.add_exactly_
    monkeypatch.setattr(
        long_sums, "add_exactly_", lambda *t: (flushed.append(t[0]), add_exactly_(*t))
    )
    fit(tmp_path / "short")
    assert not flushed
    monkeypatch.setattr(long_sums, "FLUSH_AFTER", 4)
    fit(tmp_path / "long")
    assert flushed


# -- runs that are interrupted ---------------------------------------------------------------------


def has_second_levels(store: Path) -> bool:
    for file in (store / STATE).rglob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
        if any(name.startswith(long_sums.SECOND) for name in names):
            return True
    return False


@pytest.mark.usefixtures("frequent")
def test_a_run_with_flushes_that_is_killed_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ends_with_the_same_bytes("in groups and blocks", 23, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("frequent")
@pytest.mark.parametrize("name", FITS)
def test_a_run_with_flushes_that_is_killed_anywhere_ends_with_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ends_with_the_same_bytes(name, 1, tmp_path, monkeypatch)


@pytest.mark.usefixtures("frequent")
def test_a_run_with_flushes_that_is_preempted_after_any_step_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fit(tmp_path / "whole", save_minutes=100)
    wanted, with_second_levels, steps = content(tmp_path / "whole"), 0, 0
    ended = True
    while ended:
        ended, steps = preempted_after(steps + 1, tmp_path / "store", monkeypatch), steps + 1
        if ended:
            with_second_levels += has_second_levels(tmp_path / "store")
            fit(tmp_path / "store", save_minutes=100)
        assert content(tmp_path / "store") == wanted, f"preempted after step {steps}"
        shutil.rmtree(tmp_path / "store")
    assert 2 <= with_second_levels < steps - 1


def preempted_after(step: int, output: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a fit, asked to end after so many steps, did."""
    asked: list[bool] = []
    with monkeypatch.context() as patch:
        patch.setattr(preemption, "requested", lambda: asked.append(True) or len(asked) == step)
        try:
            fit(output, save_minutes=100)
        except Preempted:
            return True
    return False


@pytest.mark.usefixtures("frequent")
@pytest.mark.parametrize("stage", ["covariance", pytest.param("refit", marks=pytest.mark.slow)])
def test_states_with_second_levels_are_added_to_a_rest_that_is_shared_out_anew(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    exact = fit(tmp_path / "exact", accumulate="float64")
    flush, store = 1, tmp_path / "store"
    while not any((store / STATE).glob(f"{stage}-1/0-0-3/part.json")):
        shutil.rmtree(store, ignore_errors=True)
        flush += 1
        assert killed_at(flush, store, monkeypatch)
    assert has_second_levels(store)
    monkeypatch.setattr("ekfac_dist.fit.start.step_tokens", lambda *_: 8)
    began = []
    take_up = checkpoints._SavedState.complete
    monkeypatch.setattr(
        checkpoints._SavedState, "complete", lambda s: (began.append(s._kept), take_up(s))[1]
    )
    factors = fit(store)
    assert any(began)
    for name in exact.modules:
        assert relative(dense_E(factors, name), dense_E(exact, name)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_a_run_with_flushes_goes_on_with_other_workers(workers: int, tmp_path: Path):
    script, store = HERE / "worker_second_level.py", tmp_path / "store"
    assert run_workers(script, 2, store, "40", timeout=90).returncode != 0
    assert has_second_levels(store)
    done = run_workers(script, workers, store, timeout=90)
    assert done.returncode == 0, done.stderr
    exact = estimate_factors(build("llama"), examples(25), accumulate="float64", batch_tokens=16)
    factors = load_factors(store)
    for name in exact.modules:
        assert relative(dense_E(factors, name), dense_E(exact, name)) < 1e-6


# -- what is planned -------------------------------------------------------------------------------


def wide_modules(number: int = 4) -> list[TrackedModule]:
    return [
        TrackedModule(f"m{k}", LINEAR, 1000, 500, False, f"m{k}.input", f"m{k}.output")
        for k in range(number)
    ]


LONG, SHORT = WorkerShare(10**4, 10**6, 10**8), WorkerShare(500, 4095, 400_000)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_memory_of_second_levels_is_planned_where_it_is(on_cpu: bool):
    def planned(share: WorkerShare, **settings):
        factors = FactorsConfig(**settings)
        return memory(
            wide_modules(), StepMemory.nothing(), 0, share, factors=factors, on_cpu=on_cpu
        )

    long, short = planned(LONG), planned(SHORT)
    # Block rows hold little more than a half.
    covariance, spectra = long.second_levels["covariance"], 4 * 4 * 500 * 1000
    assert 0.5 < covariance / (4 * 4 * (1000**2 + 500**2)) < 0.75
    assert long.second_levels["refit"] == spectra
    grows = {stage: long.passes[stage] - held for stage, held in short.passes.items()}
    assert grows == {
        "covariance": covariance * on_cpu,
        "eigenbasis": 0,
        "refit": spectra * on_cpu,
    }
    waiting = long.covariance + 2 * 8 * 1000**2  # while the largest factor is decomposed
    assert long.host == (0 if on_cpu else max(covariance, spectra, waiting))
    assert planned(LONG, accumulate="float64") == planned(SHORT, accumulate="float64")
    assert planned(LONG, refit="none").second_levels["refit"] == 0
    # A GPU adds a step's product at once, a CPU in blocks of rows.
    many_rows = WorkerShare(4000, 10**6, 10**6)
    assert planned(many_rows, refit="per_token").second_levels == {
        "covariance": covariance * on_cpu,
        "refit": spectra * on_cpu,
    }


def test_groups_are_chosen_by_the_hosts_memory_too():
    nothing, factors = StepMemory.nothing(), FactorsConfig()

    def needs(group, places=NOT_SHARED, checkpoints=False, tokens=0):
        return memory(group, nothing, 0, LONG, factors=factors, on_cpu=False, places=places)

    def groups_for(host):
        return arrange(modules, 1, factors, False, [1], needs, Limits(1e12, host)).groups

    modules = wide_modules(8)
    all_at_once = max(needs(modules).second_levels.values())
    assert len(groups_for(2 * all_at_once)) == 1
    assert len(groups_for(all_at_once / 2)) > 2
    one = needs(groups_for(100)[0])
    assert one.lack(1e12, 100) == (max(one.second_levels.values()), 100)


@pytest.mark.usefixtures("frequent")
def test_room_for_states_counts_their_second_levels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    written: dict[str, int] = {}
    write_part = checkpoints.write_part

    def measured(directory: Path, *rest, **settings):
        write_part(directory, *rest, **settings)
        size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        stage = directory.parent.name.removesuffix("-1")
        written[stage] = max(written.get(stage, 0), size)

    monkeypatch.setattr(checkpoints, "write_part", measured)
    monkeypatch.setattr("helpers.networks._rope.__defaults__", (96, 200, 1, 2))
    factors = estimate_factors(
        build("llama"), examples(9), output=tmp_path / "store", batch_tokens=8, save_minutes=0
    )
    modules = list(factors.modules.values())
    long, short = (
        stage_bytes(modules, FactorsConfig(), 1, 1, share, on_cpu=True)
        for share in (WorkerShare(9, 9, 99), WorkerShare(1, 1, 1))
    )
    for stage, size in written.items():
        assert size == pytest.approx(long[stage][1] / 2, rel=0.05)
        assert short[stage][1] < 0.6 * long[stage][1]
