"""The cheapest arrangement that fits is taken, by made-up needs of memory."""

import itertools
import math

import pytest

from ekfac_dist.config import FactorsConfig
from ekfac_dist.fit.arrangement import Arrangement, Limits, arrange, most_needed, step_sizes
from ekfac_dist.fit.partition import partition
from ekfac_dist.fit.worker_memory import USABLE, Memory
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.passes.owners import Places, families, family_cost

# Eight layers of one module with its own input, of three sizes.
MODULES = [
    TrackedModule(
        name=f"layers.{k}.up",
        kind="linear",
        num_inputs=size,
        num_outputs=size,
        bias=False,
        input=f"layers.{k}.up.input",
        output=f"layers.{k}.up.output",
    )
    for k, size in enumerate((4, 4, 6, 6, 4, 4, 8, 8))
]
SIZES = [64, 32, 16, 8]


def memory(step: int, sums: int, host: int = 0) -> Memory:
    """What is held at once: a step and sums; on the host of a GPU, something else."""
    return Memory(
        process=0,
        weights=0,
        step=step,
        exchange=0,
        covariance=sums,
        bases=sums,
        spectra=0,
        workspace=0,
        retained=0,
        second_levels={"covariance": host, "refit": host},
        halves={"covariance": 0, "refit": 0},
        on_cpu=False,
    )


def needed(group, places, checkpoints, tokens) -> Memory:
    """A step takes 10 bytes a token, 3 of them with checkpointing; sums a byte an element."""
    sums = max(sum(map(family_cost, families(part).values())) for part in places.parts(group))
    return memory((3 if checkpoints else 10) * tokens, sums)


def chosen(
    free: float, *, workers: int = 4, checkpointing="auto", sizes=SIZES, **factors
) -> tuple[int, int, bool, int]:
    """Groups, tokens of a step, checkpointing and shard of what is chosen."""
    found = arrange(
        MODULES, workers, FactorsConfig(**factors), checkpointing, sizes, needed, Limits(free)
    )
    return in_short(found)


def in_short(found: Arrangement) -> tuple[int, int, bool, int]:
    return len(found.groups), found.step_tokens, found.checkpoints, found.shard


WHOLE = sum(map(family_cost, families(MODULES).values()))


def test_the_made_up_needs_are_known():
    assert WHOLE == 3 * (4 * 16 + 2 * 36 + 2 * 64)  # A, S and Λ of each


def test_what_fits_as_it_is_stays_as_it_is():
    assert chosen(math.inf) == (1, 64, False, 1)
    assert chosen((WHOLE + 640) / USABLE) == (1, 64, False, 1)


def test_each_means_is_taken_only_if_those_before_it_do_not_do():
    half, quarter = (shared_by(number) for number in (2, 4))
    # A step of 64 tokens takes 640 bytes, with checkpointing 192.
    assert chosen((WHOLE + 640) / USABLE - 1) == (1, 64, True, 1)
    assert chosen((WHOLE + 192) / USABLE - 1) == (1, 64, True, 2)
    assert chosen((half + 192) / USABLE - 1) == (1, 64, True, 4)
    assert chosen((WHOLE + 640) / USABLE - 1, checkpointing=False) == (1, 64, False, 2)
    assert chosen((half + 640) / USABLE - 1, checkpointing=False) == (1, 64, False, 4)
    assert chosen((quarter + 192) / USABLE - 1)[1:] == (32, True, 4)
    assert chosen((quarter + 24) / USABLE) == (1, 8, True, 4)
    groups, *_, shard = chosen((quarter + 24) / USABLE - 1)
    assert groups > 1
    assert shard == 4


def shared_by(number: int) -> int:
    places = Places.of(MODULES, number)
    return needed(MODULES, places, False, 0).covariance


@pytest.mark.parametrize("workers", [1, 2, 4, 6])
def test_no_arrangement_that_fits_is_cheaper(workers: int):
    """All are tried: fewest groups, then large steps, the least shard, no checkpointing."""
    shards = [d for d in range(1, workers + 1) if workers % d == 0]
    most = {}
    for number, shard in itertools.product(range(1, len(MODULES) + 1), shards):
        if number > 1 and shard < workers:
            continue  # several passes are for what all workers together cannot hold
        groups, places = partition(MODULES, number), Places.of(MODULES, shard)
        for tokens, checkpoints in itertools.product(SIZES, (False, True)):
            peaks = [needed(group, places, checkpoints, tokens).peak for group in groups]
            most[len(groups), -tokens, shard, checkpoints] = max(peaks)
    for free in range(200, 2500, 31):
        fitting = [cost for cost, peak in most.items() if peak <= USABLE * free]
        found = chosen(free, workers=workers)
        if fitting:
            groups, tokens, shard, checkpoints = min(fitting)
            assert found == (groups, -tokens, checkpoints, shard), free
        else:  # what needs least, to be refused or tried
            assert found == (len(MODULES), 8, True, workers)


def test_what_is_configured_is_kept():
    assert chosen(math.inf, shard=2) == (1, 64, False, 2)
    assert chosen(math.inf, checkpointing=True) == (1, 64, True, 1)
    assert chosen(math.inf, partitions=3) == (3, 64, False, 1)
    for free in (300, 500, 900):
        assert chosen(free, shard=1)[3] == 1
        assert chosen(free, checkpointing=False)[2] is False
        assert chosen(free, partitions=2)[0] == 2
        assert chosen(free, sizes=[16])[1] == 16


def test_what_is_configured_and_does_not_fit_is_tried_with_the_least():
    assert chosen(1, partitions=2) == (2, 8, True, 4)
    assert chosen(1, partitions=2, shard=1, checkpointing=False) == (2, 8, False, 1)


def test_the_hosts_memory_counts_too():
    def on_host(group, places, checkpoints, tokens):
        return memory(0, 0, host=sum(map(family_cost, families(group).values())) // places.shard)

    limits = Limits(math.inf, WHOLE / 2 / USABLE)
    found = arrange(MODULES, 4, FactorsConfig(), "auto", SIZES, on_host, limits)
    assert in_short(found) == (1, 64, False, 2)


def test_the_most_that_any_group_needs_is_what_counts():
    found = Arrangement(2, False, 16, partition(MODULES, 3))
    most = most_needed(found, MODULES, needed, Limits(math.inf))
    places = Places.of(MODULES, 2)
    peaks = [needed(group, places, False, 16).peak for group in found.groups]
    assert most.peak == max(peaks) > min(peaks)


@pytest.mark.parametrize(
    ("most", "longest", "sizes"),
    [(64, 9, [64, 32, 16]), (64, 64, [64]), (64, 100, [64]), (3, 0, [3, 1]), (1, 1, [1])],
)
def test_steps_are_halved_as_long_as_a_sequence_fits(most: int, longest: int, sizes: list[int]):
    assert step_sizes(most, longest) == sizes
