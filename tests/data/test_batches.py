"""Batches hold each sequence once, keep to their budget, and do not depend on who computes them."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ekfac_dist.data.batch_plan import assign_batches, plan_batches
from ekfac_dist.data.batches import NO_LABEL
from ekfac_dist.data.sequences import Sequence, collate

lengths_of_data = st.lists(st.integers(1, 600), max_size=80)
budgets = st.integers(1, 2000)
costs_of_batches = st.lists(st.integers(1, 5000), max_size=60)
numbers_of_workers = st.integers(1, 12)


@given(lengths=lengths_of_data, budget=budgets)
def test_every_sequence_is_in_exactly_one_batch(lengths: list[int], budget: int):
    batches = plan_batches(lengths, budget)
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    assert all(batches)


@given(lengths=lengths_of_data, budget=budgets)
def test_a_batch_keeps_to_the_budget_unless_it_is_one_long_sequence(
    lengths: list[int], budget: int
):
    for batch in plan_batches(lengths, budget):
        padded = len(batch) * max(lengths[number] for number in batch)
        assert padded <= budget or len(batch) == 1


@given(lengths=lengths_of_data, budget=budgets)
def test_batches_are_neighbours_in_length_and_as_full_as_can_be(lengths: list[int], budget: int):
    batches = plan_batches(lengths, budget)
    for one, following in pairwise(batches):
        shortest = min(lengths[number] for number in one)
        longest = max(lengths[number] for number in one)
        assert shortest >= max(lengths[number] for number in following)
        assert (len(one) + 1) * longest > budget


@given(lengths=lengths_of_data, budget=budgets)
def test_little_padding_is_ever_computed(lengths: list[int], budget: int):
    """In sorted order the padding of all batches telescopes: a fullest batch of the spread."""
    batches = plan_batches(lengths, budget)
    padding = sum(
        max(lengths[n] for n in batch) * len(batch) - sum(lengths[n] for n in batch)
        for batch in batches
    )
    fullest = max((len(batch) for batch in batches), default=0)
    spread = max(lengths, default=0) - min(lengths, default=0)
    assert padding <= spread * fullest


@given(lengths=lengths_of_data, budget=budgets)
def test_batches_are_the_same_whatever_type_the_lengths_have(lengths: list[int], budget: int):
    as_array = np.array(lengths, dtype=np.int64)
    assert plan_batches(lengths, budget) == plan_batches(as_array, budget)


@given(costs=costs_of_batches, num_workers=numbers_of_workers)
def test_every_batch_has_exactly_one_worker(costs: list[int], num_workers: int):
    shards = assign_batches(costs, num_workers)
    assert len(shards) == num_workers
    assert sorted(number for shard in shards for number in shard) == list(range(len(costs)))
    assert all(shard == sorted(shard) for shard in shards)


@given(costs=costs_of_batches, num_workers=numbers_of_workers)
def test_no_worker_has_more_than_another_by_more_than_one_batch(costs: list[int], num_workers: int):
    loads = [sum(costs[n] for n in shard) for shard in assign_batches(costs, num_workers)]
    assert max(loads) - min(loads) <= max(costs, default=0)


@given(costs=costs_of_batches)
def test_one_worker_does_everything_in_order(costs: list[int]):
    assert assign_batches(costs, 1) == [list(range(len(costs)))]


@pytest.mark.parametrize("num_workers", [1, 2, 3, 8])
def test_the_batches_are_the_same_for_any_number_of_workers(num_workers: int):
    lengths = [(7 * n) % 61 + 1 for n in range(50)]
    batches = plan_batches(lengths, 128)
    costs = [len(batch) * max(lengths[n] for n in batch) for batch in batches]
    shards = assign_batches(costs, num_workers)
    computed = [batches[number] for shard in shards for number in shard]
    assert sorted(computed) == sorted(batches)


def test_a_worker_may_have_nothing_to_do():
    assert assign_batches([5, 3], 4) == [[0], [1], [], []]
    assert assign_batches([], 2) == [[], []]
    assert plan_batches([], 64) == []


def test_a_batch_may_use_up_its_budget():
    assert plan_batches([8] * 5, 24) == [[0, 1, 2], [3, 4]]


def test_equal_batches_go_to_workers_in_turn():
    assert assign_batches([4] * 6, 3) == [[0, 3], [1, 4], [2, 5]]


def test_the_costliest_batches_are_given_away_first():
    assert assign_batches([1, 1, 1, 3], 2) == [[3], [0, 1, 2]]


# -- collation -------------------------------------------------------------------------------------


def sequence(index: int, inputs: list[int], targets: list[int]) -> Sequence:
    return Sequence(index, np.array(inputs, dtype=np.int32), np.array(targets, dtype=np.int32))


def test_shorter_sequences_are_padded_on_the_right():
    batch = collate([sequence(4, [5, 6, 7], [6, 7, 8]), sequence(9, [3], [2])])
    assert batch.indices == (4, 9)
    assert batch.grid("").lengths == (3, 1)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7], [3, 0, 0]]
    assert batch.inputs["labels"].tolist() == [[6, 7, 8], [2, NO_LABEL, NO_LABEL]]
    assert "attention_mask" in batch.inputs
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.grid("").real is not None
    assert batch.grid("").real.tolist() == [0, 1, 2, 3]
    assert batch.labelled.flat.tolist() == [0, 1, 2, 3]
    assert (batch.num_positions, len(batch.labelled.flat)) == (4, 4)


def test_a_batch_of_one_length_has_no_padding_to_tell_of():
    batch = collate([sequence(0, [5, 6], [NO_LABEL, 7]), sequence(1, [1, 2], [2, 3])])
    assert "attention_mask" not in batch.inputs
    assert batch.grid("").real is None
    assert batch.labelled.flat.tolist() == [1, 2, 3]
    assert (batch.num_positions, len(batch.labelled.flat)) == (4, 3)


rows = st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=9), min_size=1, max_size=6)


@given(rows=rows)
def test_a_batch_holds_what_went_in_and_nothing_else(rows: list[list[int]]):
    batch = collate([sequence(n, row, [i + 1 for i in row]) for n, row in enumerate(rows)])
    flat = batch.inputs["input_ids"].flatten()
    real = torch.arange(flat.numel()) if batch.grid("").real is None else batch.grid("").real
    assert flat[real].tolist() == [token for row in rows for token in row]
    assert batch.inputs["labels"].flatten()[batch.labelled.flat_on_device].tolist() == [
        i + 1 for row in rows for i in row
    ]
    assert batch.inputs["input_ids"].dtype == batch.inputs["labels"].dtype == torch.int64


def test_a_moved_batch_is_the_same_batch():
    batch = collate([sequence(4, [5, 6, 7], [6, 7, 8]), sequence(9, [3], [2])])
    moved = batch.to(torch.device("cpu"))
    assert moved.indices == batch.indices
    assert set(moved.inputs) == {"input_ids", "labels", "attention_mask"}
    for name, tensor in batch.inputs.items():
        assert torch.equal(moved.inputs[name], tensor)
    assert torch.equal(moved.labelled.flat_on_device, batch.labelled.flat_on_device)
    assert torch.equal(moved.grid("").real, batch.grid("").real)
