"""Started on W workers by test_processes.py: tries everything that `World` does, and tells.

Each check runs on every worker, with plain asserts. What became of each goes to RANK.json in the
directory that is named on the command line.
"""

import itertools
import json
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ekfac_dist.errors import (
    DataError,
    ModelError,
    NonFiniteError,
    OutOfMemory,
    PeerError,
    Preempted,
)
from ekfac_dist.runtime import collectives, groups
from ekfac_dist.runtime.heartbeat import heartbeat
from ekfac_dist.runtime.peers import was_agreed
from ekfac_dist.runtime.processes import World

DTYPES = (torch.float32, torch.float64, torch.int64, torch.float16, torch.bfloat16)


def shards(world: World) -> list[list[torch.Tensor]]:
    """Every worker's tensors, of whole numbers so that their sums are exact."""
    shapes = [(), (1,), (0,), (3, 5), (17,), (2, 2, 2), (400,), (5,)]
    generator = torch.Generator().manual_seed(1)
    return [
        [
            torch.randint(-9, 10, shape, generator=generator).to(dtype)
            for shape, dtype in zip(shapes * 2, itertools.cycle(DTYPES), strict=False)
        ]
        for _ in range(world.size)
    ]


def raised(act: Callable[[], object]) -> Exception:
    """What `act` raises."""
    try:
        act()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def raised_in_agreement(
    world: World, act: Callable[[], object], *, takes_part: bool = True
) -> Exception:
    """What comes out of `agree` where `act` may raise on some."""

    def agree() -> None:
        with world.agree(takes_part=takes_part):
            act()

    return raised(agree)


def fail(error: Exception) -> None:
    raise error


def with_nccl_alone() -> World:
    """The workers as in a script whose process group is NCCL's alone."""
    backends, groups.backends = groups.backends, lambda: {"cuda": "nccl"}
    try:
        return World.start()
    finally:
        groups.backends = backends


# -- the checks ------------------------------------------------------------------------------------


def a_worker_knows_its_place(world: World, directory: Path) -> None:
    assert world.backend == "gloo"
    assert world.device == torch.device("cpu")
    assert world.is_main == (world.rank == 0)
    assert world.who == f"worker {world.rank} of {world.size}"
    assert world.gather(world.rank) == list(range(world.size))
    assert world.describe()[1:] == ("cpu", torch.get_num_threads())


def gather_keeps_the_order_of_ranks(world: World, directory: Path) -> None:
    """Objects of very different sizes, None among them."""
    mine = {"rank": world.rank, "text": "x" * 1000**world.rank} if world.rank else None
    everyones = world.gather(mine)
    assert everyones[0] is None
    assert [held["rank"] for held in everyones[1:]] == list(range(1, world.size))
    assert [len(held["text"]) for held in everyones[1:]] == [
        1000**rank for rank in range(1, world.size)
    ]


def a_control_group_of_its_own_does_all_that_the_default_one_does(
    world: World, directory: Path
) -> None:
    run = with_nccl_alone()
    assert run.control is not None
    assert run.control is with_nccl_alone().control
    assert run.gather(run.rank) == list(range(run.size))
    assert run.share(run.rank) == 0
    assert run.begin_sum([run.rank, 1])() == [sum(range(run.size)), run.size]
    for tensor in (run.broadcast_(torch.tensor([run.rank])), torch.tensor([0])):
        run.all_reduce_([tensor])
        assert tensor.item() == 0
    moved = run.moved({"a": torch.tensor([run.rank])}, 1, 0)
    assert {name: t.item() for name, t in moved.items()} == ({"a": 1} if run.rank == 0 else {})


def share_gives_worker_0s_value(world: World, directory: Path) -> None:
    assert world.share({"from": world.rank}) == {"from": 0}


def broadcast_overwrites_in_place(world: World, directory: Path) -> None:
    for dtype in DTYPES:
        for shape in ((), (4, 3), (0,)):
            tensor = torch.full(shape, world.rank + 1, dtype=dtype)
            assert world.broadcast_(tensor) is tensor
            assert torch.equal(tensor, torch.ones(shape, dtype=dtype))


def all_reduce_gives_plain_sums_whatever_the_buckets(world: World, directory: Path) -> None:
    usual = collectives.BUCKET_BYTES
    for limit in (1, 40, 1000, usual):
        collectives.BUCKET_BYTES = limit
        everyones = shards(world)
        mine = everyones[world.rank]
        pointers = [tensor.data_ptr() for tensor in mine]
        expected = [sum(column[1:], column[0]) for column in zip(*shards(world), strict=True)]
        world.all_reduce_(mine)
        assert [tensor.data_ptr() for tensor in mine] == pointers
        for tensor, total in zip(mine, expected, strict=True):
            assert tensor.dtype == total.dtype
            assert torch.equal(tensor, total)
    collectives.BUCKET_BYTES = usual


def all_reduce_of_nothing_is_nothing(world: World, directory: Path) -> None:
    world.all_reduce_([])


def agreement_is_silent_where_nothing_fails(world: World, directory: Path) -> None:
    with world.agree():
        pass
    with world.agree(takes_part=world.is_main):
        pass


def one_that_fails_fails_all_and_is_named(world: World, directory: Path) -> None:
    error = raised_in_agreement(
        world, lambda: fail(DataError("No rows.")) if world.rank == 1 else None
    )
    assert type(error) is (DataError if world.rank == 1 else PeerError)
    assert str(error) == f"worker 1 of {world.size}: No rows."
    assert was_agreed(error)


def all_that_fail_alike_say_it_once(world: World, directory: Path) -> None:
    error = raised_in_agreement(world, lambda: fail(ModelError("No model.")))
    assert type(error) is ModelError
    assert str(error) == "No model."
    assert was_agreed(error)


def those_who_take_part_speak_for_all(world: World, directory: Path) -> None:
    error = raised_in_agreement(
        world,
        lambda: fail(DataError("No room.")) if world.is_main else None,
        takes_part=world.is_main,
    )
    assert type(error) is (DataError if world.is_main else PeerError)
    assert str(error) == "No room."


def the_first_of_different_failures_is_told(world: World, directory: Path) -> None:
    error = raised_in_agreement(world, lambda: fail(DataError(f"Row {world.rank} is bad.")))
    assert str(error) == f"worker 0 of {world.size}: Row 0 is bad."


def memory_that_runs_out_on_one_is_a_sentence_on_all(world: World, directory: Path) -> None:
    cause = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has …")
    error = raised_in_agreement(world, lambda: fail(cause) if world.rank == 1 else None)
    assert type(error) is (OutOfMemory if world.rank == 1 else PeerError)
    assert error.status == 2
    said = f"worker 1 of {world.size}: Memory ran out (CUDA out of memory. Tried to allocate 2.00"
    assert str(error).startswith(said)
    assert was_agreed(error)


def a_defect_keeps_its_own_traceback(world: World, directory: Path) -> None:
    cause = ZeroDivisionError("division by zero")
    error = raised_in_agreement(world, lambda: fail(cause) if world.rank == 1 else None)
    if world.rank == 1:
        assert error is cause
    else:
        assert type(error) is PeerError
        assert str(error) == f"worker 1 of {world.size}: ZeroDivisionError: division by zero"


def main_first_lets_the_others_find_what_it_made(world: World, directory: Path) -> None:
    made = directory / "made by the first"

    def make() -> bool:
        found = made.exists()
        if not found:
            time.sleep(0.2)
            made.write_text("")
        return found

    assert world.main_first(make) == (world.local_rank > 0)


def main_first_runs_nowhere_else_if_it_fails_there(world: World, directory: Path) -> None:
    ran: list[int] = []

    def act() -> None:
        ran.append(world.rank)
        raise DataError("No file.")

    error = raised(lambda: world.main_first(act))
    assert str(error) == "No file."
    assert ran == ([0] if world.rank == 0 else [])


def main_first_fails_everywhere_if_it_fails_on_another(world: World, directory: Path) -> None:
    def act() -> None:
        if world.rank == world.size - 1:
            raise DataError("No cache.")

    error = raised(lambda: world.main_first(act))
    assert "No cache." in str(error)


def once_per_host_gives_what_the_hosts_first_worker_made(world: World, directory: Path) -> None:
    ran: list[int] = []

    def make() -> int:
        ran.append(world.rank)
        return world.rank

    first = world.rank - world.local_rank
    assert world.once_per_host(make) == first
    assert ran == ([world.rank] if world.rank == first else [])


def once_per_host_fails_everywhere_if_it_fails(world: World, directory: Path) -> None:
    def act() -> None:
        raise DataError("No file.")

    assert "No file." in str(raised(lambda: world.once_per_host(act)))


def on_main_gives_its_result_there_alone(world: World, directory: Path) -> None:
    assert world.on_main(lambda: "made") == ("made" if world.is_main else None)
    error = raised(lambda: world.on_main(lambda: fail(DataError("No."))))
    assert str(error) == "No."


def peers_that_announce_nothing_are_not_heard(world: World, directory: Path) -> None:
    world._last_peer_check = 0.0
    world.check_peers()


def an_announced_failure_is_heard_by_the_others(world: World, directory: Path) -> None:
    run = World.start()  # a run of its own: what is announced in it stays in it
    if run.rank == 1:
        assert run.announce_failure(NonFiniteError("NaN in module a.")) is True
        assert run.announce_failure(NonFiniteError("and once more")) is False
    world.barrier()
    if run.rank != 1:
        assert run.announce_failure(NonFiniteError("a consequence")) is False
        error = raised(run.check_peers)
        assert type(error) is PeerError
        assert str(error) == f"worker 1 of {run.size}: NaN in module a."
        run.check_peers()  # within the same second it does not look again
    world.barrier()
    world._last_peer_check = 0.0
    world.check_peers()


def one_that_fails_where_others_wait_for_it_speaks_for_itself(
    world: World, directory: Path
) -> None:
    run = World.start()

    def act() -> None:
        with run.agree(together=(NonFiniteError, Preempted)):
            if run.rank == min(1, run.size - 1):
                raise ModelError("No.")
            while True:  # for a collective of that worker's that never comes
                run.check_peers()
                time.sleep(0.05)

    error = raised(act)
    assert not was_agreed(error)
    if type(error) is ModelError:
        assert str(error) == "No."
        assert run.announce_failure(error) is True  # nobody has said it yet
    else:
        assert type(error) is PeerError
        assert str(error) == f"worker 1 of {run.size}: No."
        assert run.announce_failure(error) is False
    world.barrier()


def an_end_of_all_is_agreed_on_and_hides_no_failure(world: World, directory: Path) -> None:
    run = World.start()

    def act() -> None:
        with run.agree(together=(Preempted,)):
            raise Preempted("Ended.")

    error = raised(act)
    assert (type(error), str(error)) == (Preempted, "Ended.")
    assert was_agreed(error) is (run.size > 1)
    if run.rank == run.size - 1:
        assert run.announce_failure(ModelError("No.")) is True
    world.barrier()


def time_out_after(seconds: float) -> None:
    """Gives the process group's collectives from now on so much time."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def a_wait_for_anothers_work_may_be_longer_than_a_collective(world: World, directory: Path) -> None:
    run = World.start()
    with heartbeat(run, owns_process=False):
        run.barrier()
        time_out_after(1.2)
        assert run.on_main(lambda: time.sleep(1.6)) is None
        made = run.at(run.device).gather(run.rank)  # a copy of the same worker counts on
        assert made == list(range(run.size))
        time_out_after(600)
    run.barrier()


def who_waits_for_one_that_leaves_is_told(world: World, directory: Path) -> None:
    run = World.start()
    with heartbeat(run, owns_process=False):
        if run.rank == 1:
            time.sleep(0.3)
            assert run.announce_failure(NonFiniteError("NaN in module a.")) is True
        else:
            error = raised(run.barrier)
            assert type(error) is PeerError
            assert str(error) == f"worker 1 of {run.size}: NaN in module a."
    world.barrier()


def who_waits_for_an_agreement_hears_of_a_failure_only_there(world: World, directory: Path) -> None:
    """One has failed at once and another is at work for longer: all still agree."""
    run = World.start()

    def act() -> None:
        if run.is_main:
            raise DataError("No rows.")
        if run.rank == run.size - 1:
            time.sleep(1.5)

    with heartbeat(run, owns_process=False):
        error = raised_in_agreement(run, act)
    assert type(error) is (DataError if run.is_main else PeerError)
    assert str(error) == f"worker 0 of {run.size}: No rows."
    assert was_agreed(error)
    world.barrier()


CHECKS = [
    a_worker_knows_its_place,
    gather_keeps_the_order_of_ranks,
    a_control_group_of_its_own_does_all_that_the_default_one_does,
    share_gives_worker_0s_value,
    broadcast_overwrites_in_place,
    all_reduce_gives_plain_sums_whatever_the_buckets,
    all_reduce_of_nothing_is_nothing,
    agreement_is_silent_where_nothing_fails,
    one_that_fails_fails_all_and_is_named,
    all_that_fail_alike_say_it_once,
    those_who_take_part_speak_for_all,
    the_first_of_different_failures_is_told,
    memory_that_runs_out_on_one_is_a_sentence_on_all,
    a_defect_keeps_its_own_traceback,
    main_first_lets_the_others_find_what_it_made,
    main_first_runs_nowhere_else_if_it_fails_there,
    main_first_fails_everywhere_if_it_fails_on_another,
    once_per_host_gives_what_the_hosts_first_worker_made,
    once_per_host_fails_everywhere_if_it_fails,
    on_main_gives_its_result_there_alone,
    peers_that_announce_nothing_are_not_heard,
    an_announced_failure_is_heard_by_the_others,
    one_that_fails_where_others_wait_for_it_speaks_for_itself,
    an_end_of_all_is_agreed_on_and_hides_no_failure,
    a_wait_for_anothers_work_may_be_longer_than_a_collective,
    who_waits_for_one_that_leaves_is_told,
    who_waits_for_an_agreement_hears_of_a_failure_only_there,
]


if __name__ == "__main__":
    world, directory = World.start(), Path(sys.argv[1])
    became = {}
    for check in CHECKS:
        try:
            check(world, directory)
            became[check.__name__] = "held"
        except Exception:
            became[check.__name__] = traceback.format_exc()
        (directory / f"{world.rank}.json").write_text(json.dumps(became))
    world.close()
