"""A store that is to be overwritten stays whole until something of the new run is on the disk."""

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.killed_fits import Killed, content, content_of_unfinished, fit, is_complete, killed_at
from helpers.workshop import run_workers

from ekfac_dist import load_factors
from ekfac_dist.errors import OutputError
from ekfac_dist.factors import writer as store_writer
from ekfac_dist.factors.layout import FOLDERS, MANIFEST, STATE
from ekfac_dist.factors.writer import StoreWriter
from ekfac_dist.fit import checkpoints
from ekfac_dist.models.capture.hooks import Capture
from ekfac_dist.runtime.journal import JOURNAL
from ekfac_dist.runtime.lock import LOCK

HERE = Path(__file__).parent
OLD = {"labels": "data", "keep_covariance": False}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store and an unfinished one of one configuration; and what another comes to."""
    root = tmp_path_factory.mktemp("overwrite")
    fit(root / "finished", **OLD)
    with pytest.MonkeyPatch.context() as patch:
        assert killed_at(14, root / "unfinished", patch, **OLD)
    assert any((root / "unfinished" / STATE).glob("*/*/part.json"))
    fit(root / "wanted")
    return root


@pytest.fixture(params=["finished", "unfinished"])
def old(request: pytest.FixtureRequest, stores: Path, tmp_path: Path) -> Path:
    """A store of another configuration, to be overwritten."""
    return shutil.copytree(stores / request.param, tmp_path / "store")


def unchanged(store: Path, before: dict[str, bytes]) -> bool:
    """Whether a store is as it was; a killed process leaves its lock, which holds nobody."""
    found = content_of_unfinished(store)
    found.pop(LOCK, None)
    return found == {name: held for name, held in before.items() if name != LOCK}


def no_room(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def as_if_killed(patch: pytest.MonkeyPatch):
    """Within it nothing is tidied up at the end but the lock, which the system takes back."""
    with patch.context() as within:
        within.setattr(StoreWriter, "close", lambda writer: writer._lock.release())
        yield within


# -- before anything of the new run is on the disk -------------------------------------------------


@pytest.mark.parametrize("save_minutes", [0, None])
def test_a_disk_that_fills_up_at_the_first_of_it_leaves_the_old_one(
    old: Path, save_minutes: int | None, monkeypatch: pytest.MonkeyPatch
):
    before = content_of_unfinished(old)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        with pytest.raises(OutputError, match="No space left on device"):
            fit(old, overwrite=True, save_minutes=save_minutes)
    assert content_of_unfinished(old) == before


def test_a_disk_without_room_for_both_is_told_so_and_leaves_the_old_one(
    old: Path, monkeypatch: pytest.MonkeyPatch
):
    before = content_of_unfinished(old)
    monkeypatch.setattr(store_writer, "free_disk_bytes", lambda path: 1000)
    with pytest.raises(
        OutputError, match=r"and 1\.0 kB are free beside the store there \([\d.]+ .B\)"
    ):
        fit(old, overwrite=True)
    assert content_of_unfinished(old) == before


@pytest.mark.parametrize("place", [(Capture, "run"), (checkpoints, "write_part")])
def test_a_run_killed_before_the_first_of_it_leaves_the_old_one(
    old: Path, place: tuple[Any, str], stores: Path, monkeypatch: pytest.MonkeyPatch
):
    def kill(*_: object, **__: object) -> None:
        raise Killed

    before = content_of_unfinished(old)
    with as_if_killed(monkeypatch) as patch:
        patch.setattr(*place, kill)
        with pytest.raises(Killed):
            fit(old, overwrite=True)
    assert unchanged(old, before)
    fit(old, overwrite=True)
    assert content(old) == content(stores / "wanted")


def test_until_then_others_can_read_the_old_one(
    stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store, seen, run = shutil.copytree(stores / "finished", tmp_path / "store"), [], Capture.run

    def look(*arguments: Any) -> Any:
        seen.append(is_complete(store))
        return run(*arguments)

    monkeypatch.setattr(Capture, "run", look)
    fit(store, overwrite=True, save_minutes=None)
    # Whole as long as the covariance pass lasts, whose result is the first of the new run.
    assert seen == sorted(seen, reverse=True)
    assert seen.count(True) == seen.count(False) > 1
    assert content(store) == content(stores / "wanted")


# -- the moment in which it takes the old one's place ----------------------------------------------

STEPS: list[tuple[Any, str]] = [
    (os, "fsync"),
    (Path, "mkdir"),
    (Path, "touch"),
    (Path, "replace"),
    (Path, "rename"),
    (Path, "unlink"),
    (shutil, "rmtree"),
]


def killed_in_the_swap(at: int, step: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a run came to that call of the system as it took the old store's place."""
    calls, replacing = 0, False
    replace_store = StoreWriter._replace

    def counted(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            nonlocal calls
            calls += replacing
            if replacing and calls == at:
                raise Killed
            return plain(*arguments, **settings)

        return call

    def replace(*arguments: Any) -> None:
        nonlocal replacing
        replacing = True
        replace_store(*arguments)
        replacing = False

    with as_if_killed(monkeypatch) as patch:
        patch.setattr(StoreWriter, "_replace", replace)
        for owner, name in STEPS:
            patch.setattr(owner, name, counted(getattr(owner, name)))
        try:
            step()
        except Killed:
            return True
    return False


def swap_ends_well(
    old: str, save_minutes: int | None, every: int, stores: Path, tmp_path: Path, patch: Any
) -> None:
    wanted, before = content(stores / "wanted"), content_of_unfinished(stores / old)
    store, at, ways = tmp_path / "store", 1, set()

    def run() -> None:
        fit(store, overwrite=True, save_minutes=save_minutes)

    shutil.copytree(stores / old, store)
    while killed_in_the_swap(at, run, patch):
        said = "whole"
        held = {name for name in before if not name.startswith(STATE)}
        if (store / MANIFEST).read_bytes() == before[MANIFEST]:
            assert all((store / name).read_bytes() == before[name] for name in held)
        else:
            said = "unfinished"
            assert not is_complete(store)
        ways.add(said)
        run()
        assert content(store) == wanted, f"killed at step {at}"
        assert {path.name for path in store.iterdir()} == {MANIFEST, *FOLDERS}
        shutil.rmtree(store)
        shutil.copytree(stores / old, store)
        at += every
    assert content(store) == wanted
    assert at > 15
    assert ways == {"whole", "unfinished"}


@pytest.mark.parametrize(("old", "save_minutes"), [("finished", 0), ("unfinished", None)])
def test_a_run_killed_as_it_takes_the_place_goes_on_or_begins_anew(
    old: str,
    save_minutes: int | None,
    stores: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    swap_ends_well(old, save_minutes, 7, stores, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("old", ["finished", "unfinished"])
@pytest.mark.parametrize("save_minutes", [0, None])
def test_a_run_killed_at_any_step_as_it_takes_the_place_goes_on_or_begins_anew(
    old: str,
    save_minutes: int | None,
    stores: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    swap_ends_well(old, save_minutes, 1, stores, tmp_path, monkeypatch)


@pytest.mark.parametrize("when", [1, 22])
def test_what_a_swap_has_left_is_no_obstacle_to_another_run(
    when: int, stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = shutil.copytree(stores / "finished", tmp_path / "store")
    at = when
    assert killed_in_the_swap(at, lambda: fit(store, overwrite=True, seed=1), monkeypatch)
    assert any(store.glob(".next-*")) == (when > 1)
    fit(store, overwrite=True)
    assert content(store) == content(stores / "wanted")


# -- what is gone on with, and what is not ---------------------------------------------------------


def test_an_unfinished_run_of_the_same_is_gone_on_with(
    stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert killed_at(60, tmp_path / "store", monkeypatch)
    journal = (tmp_path / "store" / JOURNAL).read_bytes()
    assert killed_at(10, tmp_path / "store", monkeypatch, overwrite=True)
    assert (tmp_path / "store" / JOURNAL).read_bytes().startswith(journal)
    fit(tmp_path / "store", overwrite=True)
    assert content(tmp_path / "store") == content(stores / "wanted")


def test_a_finished_run_of_the_same_is_made_anew(stores: Path, tmp_path: Path):
    store = shutil.copytree(stores / "wanted", tmp_path / "store")
    manifest = (store / MANIFEST).read_bytes()
    fit(store, overwrite=True)
    assert (store / MANIFEST).read_bytes() != manifest  # it tells other seconds
    assert content(store) == content(stores / "wanted")


# -- real processes --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_are_killed_leave_the_old_one_or_one_to_go_on_with(
    workers: int, stores: Path, tmp_path: Path
):
    run = HERE / "worker_overwrite.py"
    assert run_workers(run, workers, tmp_path / "wanted").returncode == 0
    for old in ("finished", "unfinished"):
        for place in ("state", "first", "swap"):
            store = shutil.copytree(stores / old, tmp_path / f"{old} {place}")
            before = content_of_unfinished(store)
            assert run_workers(run, workers, store, place).returncode != 0
            if place == "state":
                assert unchanged(store, before)
            assert is_complete(store) == (old == "finished" and place != "swap")
            done = run_workers(run, workers, store)
            assert done.returncode == 0, done.stderr
            assert content(store) == content(tmp_path / "wanted")
            load_factors(store)
