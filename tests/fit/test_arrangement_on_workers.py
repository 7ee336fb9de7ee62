"""Real fits on 2 workers in less and less free memory: arranged otherwise, the same factors."""

import json
from pathlib import Path

import pytest
from helpers.dense import counts_in, dense_E, relative
from helpers.killed_fits import content
from helpers.workshop import run_workers
from worker_arrangement import LESS, MIDDLE, PLENTY, WIDE

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


@pytest.fixture(scope="module")
def wide(notes: list[dict]) -> dict[int, dict]:
    """The same of the wide model."""
    return {free: notes[0][f"wide {free}"]["arrangement"] for free in (PLENTY, *WIDE)}


def fitting(notes: dict) -> list[int]:
    return [free for free in (PLENTY, *LESS) if "refusal" not in notes[str(free)]]


def ways(arrangement: dict, simplest: dict) -> frozenset[str]:
    """In what an arrangement is another than the simplest."""
    return frozenset(way for way in simplest if arrangement[way] != simplest[way])


def test_all_workers_arrange_alike(notes: list[dict]):
    for name in notes[0]:
        assert notes[0][name].get("arrangement") == notes[1][name].get("arrangement")


def test_every_way_to_hold_less_is_taken(arranged: dict[int, dict], wide: dict[int, dict]):
    simplest = {"number": 1, "shard": 1, "checkpoints": False, "step_tokens": 64}
    assert arranged[PLENTY] == simplest
    taken = {ways(each, simplest) for each in arranged.values()}
    assert {frozenset({"step_tokens"}), frozenset({"step_tokens", "checkpoints"})} < taken
    assert wide[PLENTY] == {**simplest, "step_tokens": 8}
    taken = {ways(each, wide[PLENTY]) for each in wide.values()}
    by_itself = [frozenset({"checkpoints"}), frozenset({"shard"}), frozenset({"shard", "number"})]
    assert {*by_itself} < taken


def test_less_memory_never_takes_fewer_passes_or_larger_steps(arranged: dict[int, dict]):
    numbers = [each["number"] for each in arranged.values()]
    assert numbers == sorted(numbers)
    steps = [each["step_tokens"] for each in arranged.values() if each["number"] == 1]
    assert steps == sorted(steps, reverse=True)


def test_what_is_arranged_is_said(notes: list[dict], arranged: dict[int, dict], wide: dict):
    for prefix, found in (("", arranged), ("wide ", wide)):
        for free, arrangement in found.items():
            lines = notes[0][f"{prefix}{free}"]["lines"]
            for way, line in SAYS.items():
                expected = way in ways(arrangement, found[PLENTY])
                assert (line.format(**arrangement) in lines) == expected, (free, way)
            assert not notes[1][f"{prefix}{free}"]["lines"]


def test_what_is_arranged_is_in_the_journal(notes: list[dict], arranged: dict, wide: dict):
    for prefix, found in (("", arranged), ("wide ", wide)):
        for free, arrangement in found.items():
            record = {"stage": "groups", "workers": 2, **arrangement}
            assert notes[0][f"{prefix}{free}"]["journal"] == [record]


@pytest.mark.parametrize("prefix", ["", "wide "])
def test_factors_are_the_same_however_arranged(root: Path, notes: list[dict], prefix: str):
    stores = [root / f"{prefix}{free}" for free in (WIDE if prefix else fitting(notes[0])[1:])]
    others = [load_factors(store) for store in stores]
    whole = load_factors(root / f"{prefix}{PLENTY}")
    assert all(found.manifest["data"] == whole.manifest["data"] for found in others)
    for name, module in whole.modules.items():
        expected = dense_E(whole, name)
        for store, found in zip(stores, others, strict=True):
            assert relative(dense_E(found, name), expected) < 1e-9, store
            assert counts_in(found, "eigenbasis", module) == counts_in(whole, "eigenbasis", module)


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


def test_a_run_goes_on_as_it_was_arranged_whatever_memory_is_free_then(
    root: Path, notes: list[dict], arranged: dict[int, dict]
):
    least = min(arranged)
    assert len(ways(arranged[least], arranged[PLENTY])) > 1
    for free in (MIDDLE, least):
        for of_worker in notes:
            for start in ("stopped", "stopped again"):  # again with too little for any other
                assert of_worker[f"{start} {free}"]["status"] == Preempted.status
            for start in ("stopped", "stopped again", "gone on"):
                assert of_worker[f"{start} {free}"]["arrangement"] == arranged[free]
            assert "refusal" not in of_worker[f"gone on {free}"]
        assert content(root / f"stopped {free}") == content(root / str(free))
