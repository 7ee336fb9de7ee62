"""An index that is killed while it is made, or grows: it goes on, and has the same bytes."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.killed_fits import killed_in
from helpers.made_indices import MORE, NUMBER, adding, arguments, content, make_store
from helpers.workshop import run_here
from safetensors.torch import load_file, save_file

from ekfac_dist import load_factors
from ekfac_dist.errors import StoreError
from ekfac_dist.influence.index.reader import GradientIndex
from ekfac_dist.runtime.lock import LOCK


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = make_store(tmp_path_factory.mktemp("index"))
    for output, command in (("whole", arguments), ("grown", arguments), ("grown", adding)):
        done = run_here(command(root, root / output))
        assert done.returncode == 0, done.stderr
    return root


def killed_at(flush: int, command: list, monkeypatch) -> bool:
    """Whether a run came as far as that flush to the disk, where it was killed."""

    def run() -> None:
        assert run_here(command).returncode == 0

    return killed_in(flush, run, monkeypatch)


def is_finished(index: Path, root: Path) -> bool:
    try:
        GradientIndex(index, load_factors(root / "store"))
    except StoreError:
        return False
    return True


@pytest.mark.parametrize("step", [17])
def test_killed_while_it_is_made(root, tmp_path, monkeypatch, step):
    goes_on(root, tmp_path, monkeypatch, step, arguments, "whole", None)


@pytest.mark.parametrize("step", [9])
def test_killed_while_it_grows(root, tmp_path, monkeypatch, step):
    goes_on(root, tmp_path, monkeypatch, step, adding, "grown", "whole")


@pytest.mark.slow
@pytest.mark.parametrize("command", [arguments, adding])
def test_killed_at_every_flush(root, tmp_path, monkeypatch, command):
    adds = command is adding
    names = ("grown", "whole") if adds else ("whole", None)
    goes_on(root, tmp_path, monkeypatch, 1, command, *names)


def goes_on(root, tmp_path, monkeypatch, step, command, wanted, before):
    """Kills it at every so many'th flush to the disk, and lets it go on."""
    flush, index = 2, tmp_path / "killed"
    while True:
        if before is not None:
            shutil.copytree(root / before, index)
        if not killed_at(flush, command(root, index), monkeypatch):
            break
        if before is not None:  # what was there is there
            known = GradientIndex(index, load_factors(root / "store"))
            assert len(known) in (NUMBER, NUMBER + MORE)
        done = run_here(command(root, index))
        if done.returncode:  # a new one, which was killed after all
            assert before is None, (flush, done.stderr)
            assert "holds a finished index" in done.stderr, (flush, done.stderr)
            assert is_finished(index, root)
            shutil.rmtree(index / "state", ignore_errors=True)
        assert content(index) == content(root / wanted), f"killed at flush {flush}"
        shutil.rmtree(index)
        flush += step
    assert flush > 20


def test_shards_that_are_there_are_not_made_again(root, tmp_path, monkeypatch, caplog):
    index = tmp_path / "index"
    assert killed_at(30, arguments(root, index), monkeypatch)
    made = {path.name: path.stat().st_mtime_ns for path in index.glob("shard-*")}
    assert len(made) > 3
    damaged = sorted(made)[1]
    content_of = bytearray((index / damaged).read_bytes())
    content_of[-1] ^= 1
    (index / damaged).write_bytes(content_of)
    done = run_here(arguments(root, index))
    assert done.returncode == 0, done.stderr
    assert content(index) == content(root / "whole")
    after = {path.name: path.stat().st_mtime_ns for path in index.glob("shard-*")}
    same = {name for name, time in made.items() if after[name] == time}
    assert set(made) - same <= {damaged, sorted(made)[-1]}


def test_nothing_new_is_nothing_to_do(root):
    done = run_here(arguments(root, root / "whole", "--add"))
    assert done.returncode == 0, done.stderr
    assert re.search(rf"nothing new: {NUMBER} sequences in 16 shards", done.stdout)


def test_the_parts_of_a_name_say_what_is_wrong(root, tmp_path):
    whole, new = root / "whole", tmp_path / "new"
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    refused = {
        "holds a finished index; give --add": arguments(root, whole),
        "holds no finished index to add to": arguments(root, new, "--add"),
        "holds notes.txt": arguments(root, tmp_path / "used"),
        "exists and is no directory": arguments(root, tmp_path / "used" / "notes.txt"),
        "notes.txt is no directory that can be": arguments(root, tmp_path / "used/notes.txt/index"),
        "do not begin with the 20 rows": [
            *arguments(root, whole, "--add"),
            *("--data.source", root / "queries.jsonl"),
        ],
        "index.rank is 3, but the index that": arguments(root, whole, "--add", "--index.rank", "3"),
        "index.rank is 0": arguments(root, new, "--index.rank", "0"),
        "index.dtype": arguments(root, new, "--index.dtype", "int8"),
        "is no directory": ["index", "--factors", new, "--output", tmp_path / "x"],
    }
    before = content(whole)
    for sentence, command in refused.items():
        done = run_here(command)
        assert done.returncode == 2, (sentence, done.stderr)
        assert sentence in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    assert content(whole) == before
    assert not new.exists()
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["notes.txt"]


def test_another_run_is_refused_by_what_differs(root, tmp_path, monkeypatch):
    index = tmp_path / "index"
    assert killed_at(20, arguments(root, index), monkeypatch)
    before = sorted(path.name for path in index.rglob("*"))
    refused = {
        "index.rank None (now 2)": arguments(root, index, "--index.rank", "2"),
        "holds no finished index to add to; leave --add out": arguments(root, index, "--add"),
        "batch_tokens 16 (now 64)": arguments(root, index, "--batch_tokens", "64"),
    }
    for sentence, command in refused.items():
        done = run_here(command)
        assert done.returncode == 2
        assert sentence in done.stderr, done.stderr
    assert sorted(path.name for path in index.rglob("*")) == before
    query = ["query", "--factors", root / "store", "--queries", root / "queries.jsonl"]
    done = run_here([*query, "--index", index, "--output", tmp_path / "scores"])
    assert done.returncode == 2
    assert "holds no finished index: its run did not end" in done.stderr
    assert not (tmp_path / "scores").exists()


def test_a_longer_source_is_read_as_the_index_was(root, tmp_path):
    settings = ["--data.window", "6", "--data.max_tokens", "9"]
    done = run_here(
        arguments(
            root, tmp_path / "i", "--data.source", root / "text.jsonl", *settings, "--index.rank", 2
        )
    )
    assert done.returncode == 0, done.stderr
    done = run_here(adding(root, tmp_path / "i"))
    assert done.returncode == 0, done.stderr
    grown = GradientIndex(tmp_path / "i", load_factors(root / "store"))
    assert (grown.rank, grown.manifest["data"]["config"]["window"]) == (2, 6)
    done = run_here(
        arguments(root, tmp_path / "j", "--data.source", root / "more.jsonl", *settings)
    )
    assert done.returncode == 0, done.stderr
    whole = GradientIndex(tmp_path / "j", load_factors(root / "store"))
    assert len(grown) == len(whole) > NUMBER + MORE
    assert grown.manifest["data"]["fingerprint"] == whole.manifest["data"]["fingerprint"]


def test_rows_without_a_label_can_be_added(root, tmp_path):
    index, source = tmp_path / "index", tmp_path / "longer.jsonl"
    shutil.copytree(root / "whole", index)
    source.write_text((root / "text.jsonl").read_text() + '{"text": ""}\n')
    done = run_here(arguments(root, index, "--add", "--data.source", source))
    assert done.returncode == 0, done.stderr
    assert f"nothing new: {NUMBER} sequences" in done.stdout
    query = ["query", "--factors", root / "store", "--index", index, "--scores.top_k", "3"]
    ask = ["--queries", root / "queries.jsonl", "--output", tmp_path / "scores"]
    done = run_here([*query, *ask, "--scores.rescore", "5"])
    assert done.returncode == 0, done.stderr


def test_a_model_whose_gradients_are_not_finite_is_refused(root, tmp_path):
    weights = load_file(root / "model" / "model.safetensors")
    shutil.copytree(root / "model", tmp_path / "model")
    weights["lm_head.weight"][3] = torch.inf
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    done = run_here(
        arguments(
            root,
            tmp_path / "index",
            *("--model.name", tmp_path / "model", "--model.allow_changes", "true"),
        )
    )
    assert done.returncode == 2
    assert "NaN or infinity" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "index").exists()


def test_a_state_folder_of_somebody_else_is_left_alone(root, tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "mine.txt").write_text("mine")
    done = run_here(arguments(root, tmp_path))
    assert done.returncode == 2
    assert "it holds state" in done.stderr
    assert (tmp_path / "state" / "mine.txt").read_text() == "mine"


def test_what_is_left_of_a_run_that_had_not_begun_is_no_hindrance(root, tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / ".begins.json.1.tmp").write_text("{")
    (tmp_path / LOCK).touch()
    done = run_here(arguments(root, tmp_path))
    assert done.returncode == 0, done.stderr
    left = content(tmp_path).keys() - content(root / "whole").keys()
    assert left <= {LOCK}


def test_an_index_of_a_file_that_has_grown_answers_until_it_has_grown_too(root, tmp_path):
    source = tmp_path / "text.jsonl"
    shutil.copyfile(root / "text.jsonl", source)
    index = tmp_path / "i"
    done = run_here(arguments(root, index, "--data.source", source))
    assert done.returncode == 0, done.stderr
    (tmp_path / "q.jsonl").write_text('{"prompt": "The short", "completion": " sentence is real."}')

    def scores(name):
        command = ["query", "--factors", root / "store", "--index", index]
        command += ["--queries", tmp_path / "q.jsonl", "--output", tmp_path / name]
        done = run_here([*command, "--scores.rescore", "0", "--scores.per_token", "none"])
        assert done.returncode == 0, done.stderr
        return load_file(tmp_path / name / "scores.safetensors")["scores"]

    before = scores("before")
    shutil.copyfile(root / "more.jsonl", source)
    assert torch.equal(scores("grown"), before)
    done = run_here(arguments(root, index, "--add", "--data.source", source))
    assert done.returncode == 0, done.stderr
    after = scores("after")
    assert after.shape[1] == NUMBER + MORE
    assert torch.equal(after[:, :NUMBER], before)
