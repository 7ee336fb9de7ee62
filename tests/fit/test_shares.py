"""Which worker decomposes which factor, and how many of one host at once."""

from dataclasses import dataclass

import pytest
import torch
from helpers.workshop import logged

from ekfac_dist.curvature.eigenbasis import workspace_bytes
from ekfac_dist.fit import decomposition_rounds

CPU = torch.device("cpu")
SIZES = {"a": 100, "b": 40, "c": 80, "d": 80, "e": 10}
NEED = workspace_bytes(100)


@dataclass
class Workers:
    """Stands for the workers: where each is, and what is free there."""

    places: list
    device: torch.device = CPU
    is_main: bool = True

    def gather(self, _):
        return self.places


WORK = {name: size**3 for name, size in SIZES.items()}


def rounds(*places):
    return decomposition_rounds.rounds(
        WORK, max(SIZES.values()), Workers(list(places)), sharded=True
    )


def owners(*places):
    return {factor: worker for one in rounds(*places) for worker, factor in one.items()}


def test_the_largest_factors_go_first_to_the_worker_with_least_to_do():
    found = owners(("host", "cpu", 10 * NEED), ("host", "cpu", 10 * NEED))
    # 100³ = 1,000,000 against 80³ = 512,000 twice; then 40³ and 10³ go where there is less.
    assert found == {"a": 0, "c": 1, "d": 1, "b": 0, "e": 1}


def test_workers_decompose_their_largest_factors_at_the_same_time():
    free = 10 * NEED
    assert rounds(("host", "cpu", free), ("host", "cpu", free)) == [
        {0: "a", 1: "c"},
        {0: "b", 1: "d"},
        {1: "e"},
    ]
    assert decomposition_rounds.rounds(WORK, 100, Workers([]), sharded=False) == [
        {0: name} for name in "abcde"
    ]
    assert decomposition_rounds.rounds({}, 0, Workers([]), sharded=True) == []


@pytest.mark.parametrize(("room", "taking_part"), [(0, {0}), (1, {0}), (2, {0, 1}), (3, {0, 1, 2})])
def test_only_as_many_workers_of_a_host_take_part_as_its_memory_holds(room, taking_part):
    with logged() as lines:
        assert set(owners(*[("host", "cpu", room * NEED)] * 3).values()) == taking_part
    said = f"decomposition by {len(taking_part)} of 3 workers at a time: the largest takes 480.0 kB"
    assert [line.partition(",")[0] for line in lines] == [said] * (len(taking_part) < 3)


def test_hosts_and_devices_have_memory_of_their_own():
    full = ("one", "cpu", NEED)
    assert set(owners(full, full, ("two", "cpu", NEED)).values()) == {0, 2}
    assert set(owners(("one", "cuda:0", NEED), ("one", "cuda:1", NEED)).values()) == {0, 1}


@pytest.mark.parametrize(("room", "at_once"), [(0, 1), (1, 1), (2, 2), (4, 4)])
def test_owners_of_a_host_wait_for_each_others_memory(room, at_once):
    owner_of = {"a": 0, "b": 1, "c": 2, "d": 3, "e": 0}
    workers = Workers([("host", "cpu", room * NEED)] * 4)
    with logged() as lines:
        found = decomposition_rounds.rounds(
            WORK, 100, workers, sharded=True, places=owner_of, shard=4
        )
    assert max(map(len, found)) == at_once
    assert [line.startswith(f"decomposition by {at_once} of 4 workers") for line in lines] == [
        True
    ] * (at_once < 4)
    assert sorted((f, rank) for one in found for rank, f in one.items()) == sorted(owner_of.items())
