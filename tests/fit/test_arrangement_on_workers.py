"""Real fits on 2 workers in less and less free memory: arranged otherwise, the same factors."""

import json
from pathlib import Path

import pytest
from helpers.dense import dense_E, relative
from helpers.killed_fits import content
from helpers.workshop import run_workers
from worker_arrangement import LESS, MIDDLE, PLENTY

from ekfac_dist import load_factors
from ekfac_dist.errors import Preempted

HERE = Path(__file__).parent
SAYS = {
    "shard": "factors       shared out: 2 workers hold one copy of them",
    "checkpoints": "activations   of one layer at a time (model.gradient_checkpointing)",
    "step_tokens": "memory        steps have at most {step_tokens} tokens, to fit",
    "number": "partitions    {number}, a pair of passes each",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("arranged")
    done = run_workers(HERE / "worker_arrangement.py", 2, root, timeout=400)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="module")
def notes(root: Path) -> list[dict]:
    """What each worker noted of each fit."""
    return [json.loads((root / f"said-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def arranged(notes: list[dict]) -> dict[int, dict]:
    """The arrangements by free memory, of those that were not refused."""
    of_main = notes[0]
    return {free: of_main[str(free)]["arrangement"] for free in fitting(of_main)}


def fitting(notes: dict) -> list[int]:
    return [free for free in (PLENTY, *LESS) if "refusal" not in notes[str(free)]]


def test_all_workers_arrange_alike(notes: list[dict]):
    for name in notes[0]:
        assert notes[0][name].get("arrangement") == notes[1][name].get("arrangement")


def test_every_way_to_hold_less_is_taken(arranged: dict[int, dict]):
    simplest = {"number": 1, "shard": 1, "checkpoints": False, "step_tokens": 64}
    assert arranged[PLENTY] == simplest
    for way, value in simplest.items():
        assert any(each[way] != value for each in arranged.values()), way


def test_less_memory_never_takes_fewer_passes_or_larger_steps(arranged: dict[int, dict]):
    numbers = [each["number"] for each in arranged.values()]
    assert numbers == sorted(numbers)
    steps = [each["step_tokens"] for each in arranged.values() if each["number"] == 1]
    assert steps == sorted(steps, reverse=True)


def test_what_is_arranged_is_said(notes: list[dict], arranged: dict[int, dict]):
    simplest = arranged[PLENTY]
    for free, arrangement in arranged.items():
        lines = notes[0][str(free)]["lines"]
        for way, line in SAYS.items():
            expected = arrangement[way] != simplest[way]
            assert (line.format(**arrangement) in lines) == expected, (free, way)


def test_factors_are_the_same_however_arranged(root: Path, arranged: dict[int, dict]):
    whole = load_factors(root / str(PLENTY))
    for free in arranged:
        found = load_factors(root / str(free))
        assert found.manifest["data"] == whole.manifest["data"]
        for name, module in whole.modules.items():
            assert relative(dense_E(found, name), dense_E(whole, name)) < 1e-9, free
            for factor in (module.input, module.output):
                assert count_of(found, factor) == count_of(whole, factor)


def count_of(factors, factor: str) -> int:
    return int(factors._source.header(f"eigenbasis/{factor}.safetensors")["count"])


def test_too_little_is_refused_on_every_worker(notes: list[dict]):
    least = str(LESS[-1])
    refusals = {of_worker[least]["refusal"] for of_worker in notes}
    assert len(refusals) == 1
    assert "no number of partitions fits: one module alone needs" in refusals.pop()
    assert all(of_worker[least]["status"] == 2 for of_worker in notes)
    refused = [free for free in LESS if free not in fitting(notes[0])]
    assert refused == LESS[-len(refused) :]


def test_workers_of_unequal_memory_are_planned_for_by_the_least(
    notes: list[dict], arranged: dict[int, dict]
):
    assert notes[0]["unequal"]["arrangement"] == arranged[MIDDLE] != arranged[PLENTY]
    said = [line for line in notes[0]["unequal"]["lines"] if "planned by the least" in line]
    assert len(said) == 1
    assert "(worker 1)" in said[0]


def test_a_run_goes_on_as_it_was_arranged(root: Path, notes: list[dict], arranged: dict[int, dict]):
    for of_worker in notes:
        assert of_worker["stopped"]["status"] == Preempted.status
        assert of_worker["stopped"]["arrangement"] == arranged[MIDDLE]
        assert of_worker["gone on"]["arrangement"] == arranged[MIDDLE]
        assert "refusal" not in of_worker["gone on"]
    assert content(root / "stopped") == content(root / str(MIDDLE))
