"""A run that was interrupted anywhere goes on, and ends with the same bytes as one that was not."""

import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from helpers.killed_fits import (
    FITS,
    content,
    content_of_unfinished,
    ends_with_the_same_bytes,
    fit,
    killed_at,
)
from helpers.networks import build, examples
from helpers.workshop import logged, rewrite_manifest, run_workers

from ekfac_dist import estimate_factors
from ekfac_dist.errors import OutputError, StoreError
from ekfac_dist.factors import writer
from ekfac_dist.factors.layout import MANIFEST, STATE
from ekfac_dist.fit.checkpoints import _kept, _newest_copies
from ekfac_dist.runtime.journal import JOURNAL

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", list(FITS)[:3])
def test_a_run_killed_at_some_moments_ends_with_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ends_with_the_same_bytes(name, 19, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_a_run_killed_at_any_moment_ends_with_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ends_with_the_same_bytes(name, 1, tmp_path, monkeypatch)


def test_what_is_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    flushes = 1
    while killed_at(flushes, tmp_path / "a", monkeypatch):
        shutil.rmtree(tmp_path / "a")
        flushes += 41
    # Killed shortly before its end, it decomposes nothing and passes over no data again.
    calls = []
    shutil.rmtree(tmp_path / "a")
    assert killed_at(last_flush(tmp_path / "b", monkeypatch), tmp_path / "a", monkeypatch)
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: calls.append(1) or eigh(m))
    fit(tmp_path / "a")
    assert not calls


def test_a_basis_is_written_while_the_next_factor_is_decomposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    eigh, write = torch.linalg.eigh, writer._write_file
    begun, next_had_begun = [], []

    def decomposed(matrix):
        begun.append(1)
        return eigh(matrix)

    def written(store, file, *of):
        if file.startswith("eigenbasis/"):
            number, start = len(next_had_begun) + 1, time.monotonic()
            while len(begun) <= number < number_of_factors and time.monotonic() < start + 20:
                time.sleep(0.001)
            next_had_begun.append(len(begun) > number)
        return write(store, file, *of)

    monkeypatch.setattr(torch.linalg, "eigh", decomposed)
    monkeypatch.setattr(writer, "_write_file", written)
    estimate_factors(build("llama"), examples(9))  # in memory
    number_of_factors = len(begun)
    begun.clear()
    fit(tmp_path / "a")
    assert len(next_had_begun) == number_of_factors > 2
    assert all(next_had_begun[:-1])


def test_a_fit_that_ends_by_any_error_writes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    eigh, write = torch.linalg.eigh, writer._write_file
    begun, written = [], []

    def interrupted(matrix):
        if begun:  # a basis is being written
            raise KeyboardInterrupt
        return eigh(matrix)

    def slowly(store, file, *of):
        if not file.startswith("eigenbasis/"):
            return write(store, file, *of)
        begun.append(file)
        time.sleep(0.5)
        written.append(write(store, file, *of))
        return written[-1]

    monkeypatch.setattr(torch.linalg, "eigh", interrupted)
    monkeypatch.setattr(writer, "_write_file", slowly)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "a")
    assert len(written) == len(begun) > 0


def last_flush(output: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    done, fsync = [], os.fsync
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: done.append(1) or fsync(file))
        fit(output)
    return len(done) - 2


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"batch_tokens": 17}, r"another configuration: batch_tokens 16 \(now 17\).*--overwrite"),
        ({"labels": "data"}, r"factors\.labels 'sampled' \(now 'data'\)"),
        ({"seed": 1, "number": 9}, r"another model"),
        ({"number": 8}, "another data"),
    ],
)
def test_another_run_is_refused_by_what_changed(
    changed: dict, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert killed_at(30, tmp_path / "a", monkeypatch)
    before = content_of_unfinished(tmp_path / "a")
    with pytest.raises(OutputError, match=says):
        fit(tmp_path / "a", **changed)
    assert content_of_unfinished(tmp_path / "a") == before
    fit(tmp_path / "a", **changed, overwrite=True)
    fit(tmp_path / "b", **changed)
    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("torch", r"another version of torch \(2\.\d+\.\d+\S*, now 9\.0\)"),
        ("transformers", r"another version of transformers \(5\.\d+\.\d+, now 9\.0\)"),
        ("attention", r"another attention implementation \(sdpa, now eager\)"),
        ("eps", r"another rms_norm_eps in the model's configuration \(1e-06, now 0\.001\)"),
    ],
)
def test_a_run_begun_with_other_software_or_settings_of_the_model_is_refused_by_name(
    begun: Path, name: str, says: str, monkeypatch: pytest.MonkeyPatch
):
    model = build("llama")
    if name == "attention":
        model.set_attn_implementation("eager")
    elif name == "eps":
        model.config.rms_norm_eps = 1e-3
    else:
        version = importlib.metadata.version
        monkeypatch.setattr(
            importlib.metadata, "version", lambda asked: "9.0" if asked == name else version(asked)
        )
    before = content_of_unfinished(begun)
    with pytest.raises(OutputError, match=says):
        estimate_factors(
            model, examples(9, prompts=True), output=begun, batch_tokens=16, save_minutes=0
        )
    assert content_of_unfinished(begun) == before


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fit that was killed."""
    store = tmp_path_factory.mktemp("begun") / "store"
    with pytest.MonkeyPatch.context() as patch:
        assert killed_at(30, store, patch)
    return store


def test_how_often_it_is_saved_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert killed_at(30, tmp_path / "a", monkeypatch)
    fit(tmp_path / "a", save_minutes=100)
    fit(tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_an_unfinished_run_of_an_earlier_version_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Which had no factors.shard, and where factors.eigen was rank0 if not given."""
    store = tmp_path / "a"
    assert killed_at(30, store, monkeypatch)
    rewrite_manifest(store, lambda manifest: manifest["config"]["factors"].update(eigen="rank0"))
    rewrite_manifest(store, lambda manifest: manifest["config"]["factors"].pop("shard"))
    lines = []
    for line in (store / JOURNAL).read_text().splitlines():
        record = json.loads(line.partition(" ")[2])
        record.pop("shard", None)
        text = json.dumps(record)
        lines.append(f"{hashlib.sha256(text.encode()).hexdigest()[:16]} {text}\n")
    (store / JOURNAL).write_text("".join(lines))
    with logged() as said:
        fit(store)
    assert any("goes on" in line for line in said)
    fit(tmp_path / "b")
    assert content(store) == content(tmp_path / "b")


@pytest.mark.parametrize(
    ("damage", "settings"),
    [
        ("flip", {}),
        ("remove", {"partitions": 2, "keep_covariance": False}),
        pytest.param("cut", {"keep_covariance": False}, marks=pytest.mark.slow),
        pytest.param("foreign", {"partitions": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_part_of_an_unfinished_run_is_made_again(
    damage: str, settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Files of the store and of the states, one after the other."""
    fit(tmp_path / "whole", **settings)
    wanted = content(tmp_path / "whole")
    last = "2-of-2" if "partitions" in settings else "1"
    for stage in ("covariance", "refit"):
        flush = 1
        while not any((tmp_path / "killed" / STATE).glob(f"{stage}-{last}/*/part.json")):
            shutil.rmtree(tmp_path / "killed", ignore_errors=True)
            flush += 4
            assert killed_at(flush, tmp_path / "killed", monkeypatch, **settings)
        files = [
            p.relative_to(tmp_path / "killed")
            for p in sorted((tmp_path / "killed").rglob("*"))
            if p.is_file() and p.suffix in (".safetensors", ".json") and p.name != MANIFEST
        ]
        assert any(file.parts[0] == STATE for file in files)
        for file in files[:: 1 if len(files) < 8 else 17]:
            store = shutil.copytree(tmp_path / "killed", tmp_path / "damaged")
            spoil(store / file, damage)
            fit(store, **settings)
            assert content(store) == wanted, file
            shutil.rmtree(store)
        shutil.rmtree(tmp_path / "killed")


def spoil(file: Path, damage: str) -> None:
    held = bytearray(file.read_bytes())
    if damage == "flip":
        held[-1] ^= 4
    elif damage == "cut":
        del held[-5:]
    elif damage == "foreign":
        held[:] = b"{}"
    file.write_bytes(held)
    if damage == "remove":
        file.unlink()


def test_a_damaged_journal_is_refused_by_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert killed_at(40, tmp_path / "a", monkeypatch)
    journal = tmp_path / "a" / "journal.jsonl"
    held = bytearray(journal.read_bytes())
    held[25] ^= 1
    journal.write_bytes(held)
    with pytest.raises(StoreError, match=r"journal\.jsonl is damaged in line 1.*--overwrite"):
        fit(tmp_path / "a")
    fit(tmp_path / "a", overwrite=True)


def test_a_store_that_is_no_longer_needed_is_not_overwritten_by_accident(tmp_path: Path):
    fit(tmp_path / "a")
    with pytest.raises(OutputError, match=r"finished factor store already.*--overwrite"):
        fit(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    before = content(tmp_path / "a")
    with pytest.raises(OutputError, match=r"cannot be overwritten, for it holds notes\.txt"):
        fit(tmp_path / "a", overwrite=True)
    assert content(tmp_path / "a") == before


def test_nothing_that_is_no_store_is_overwritten(tmp_path: Path):
    (tmp_path / "covariance").mkdir()
    (tmp_path / "covariance" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="no factor store"):
        fit(tmp_path, overwrite=True)
    assert (tmp_path / "covariance" / "thesis.tex").read_text() == "mine"


@pytest.mark.slow
def test_a_run_goes_on_by_itself_on_hosts_that_share_no_directory(tmp_path: Path):
    for name, kill in (("whole", []), ("killed", ["25"])):
        done = run_workers(HERE / "worker_hosts.py", 2, tmp_path / name, *kill, timeout=90)
        assert (done.returncode == 0) == (not kill), done.stderr
    done = run_workers(HERE / "worker_hosts.py", 2, tmp_path / "killed", timeout=90)
    assert done.returncode == 0, done.stderr
    one, other = (tmp_path / name / "host0" for name in ("killed", "whole"))
    assert content(one) == content(other)
    assert not list((tmp_path / "killed" / "host1").iterdir())


def test_of_a_share_that_two_hosts_have_the_longer_part_counts():
    names = ["0-1-3", "0-1-5", "0-2-3", "0-2-5", "1-0-2", "1-1-9", "1-1-8"]
    newest = [name for copy in _newest_copies(dict.fromkeys(names, 1)) for name in copy]
    assert newest == ["0-1-5", "0-2-5", "1-0-2", "1-1-9"]
    assert _kept(newest, [], 0) == ["0-1-5", "0-2-5"]
    assert _kept(newest, ["0-1-5", "0-0-7"], 1) == ["0-1-5", "1-0-2", "1-1-9"]
    assert _kept(newest, [], 7) == []
