"""A query that failed anywhere goes on, and ends with the same bytes as one that did not."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.dense import relative
from helpers.refusals import contents
from helpers.workshop import logged, save_tiny_llama, texts, write_jsonl
from safetensors.torch import load_file

from ekfac_dist import cli
from ekfac_dist.config import (
    DampingConfig,
    DataConfig,
    EstimateConfig,
    FactorsConfig,
    ModelConfig,
    QueryConfig,
    QueryDataConfig,
    RefineConfig,
    ScoresConfig,
)
from ekfac_dist.curvature.iterative import HELD_BLOCKS
from ekfac_dist.errors import OutputError, StoreError
from ekfac_dist.fit.estimate import run_estimate
from ekfac_dist.influence import blocks, data_passes
from ekfac_dist.influence import query_gradients as gradients
from ekfac_dist.influence.results import MANIFEST, ResultsReader
from ekfac_dist.influence.run import run_query
from ekfac_dist.report.page import write_report
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.lock import DirectoryLock
from ekfac_dist.runtime.processes import World

QUERIES = [
    {"prompt": "The worker reads", "completion": " a batch of tokens", "against": " one row"},
    {"prompt": "Label", "completion": " sums", "group": "pair"},
    {"text": "Each layer keeps one factor."},
    {"prompt": "Gradient", "completion": " counts", "group": "pair"},
]
# Memory for two of the three rows' gradients, so that there are two blocks; with a rank, for one
# row's whole gradients, so that the first block is scored again in two parts.
TWO_ROWS, TWO_OF_RANK_2 = 2e-5, 4e-6
ASKED = {
    "exact": {"query_memory_gb": TWO_ROWS},
    "all parts": {
        "query_memory_gb": TWO_ROWS,
        "normalize": "relatif_l",
        "self_influence": True,
        "per_token": "all",
        "per_module": True,
        "per_layer": True,
    },
    "losses of tokens": {"query_memory_gb": TWO_ROWS, "tokens": "outputs", "per_token": "all"},
    "two stages": {
        "query_memory_gb": TWO_OF_RANK_2,
        "rank": 2,
        "rescore": 5,
        "top_k": 3,
        "normalize": "cosine",
        "per_layer": True,
    },
    "two stages without details": {
        "query_memory_gb": TWO_OF_RANK_2,
        "rank": 2,
        "rescore": 5,
        "top_k": 3,
        "per_token": "none",
    },
    "candidates": {
        "query_memory_gb": TWO_ROWS,
        "candidates": [1, 3, 4, 7],
        "per_token": "none",
        "normalize": "relatif_theta",
    },
    "refined": {"query_memory_gb": HELD_BLOCKS * TWO_ROWS, "top_k": 3},
}
REFINED = {"refined": RefineConfig(method="cg", sequences=4, iterations=2)}


class Failure(BaseException):
    """What no part of the package expects."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, text, queries and factors."""
    root = tmp_path_factory.mktemp("query")
    save_tiny_llama(root / "model", mlp_bias=True)
    write_jsonl(root / "queries.jsonl", QUERIES)
    write_jsonl(root / "text.jsonl", [{"text": text} for text in texts(11, words=(2, 12))])
    fit(root, root / "store")
    return root


def fit(root: Path, store: Path, seed: int = 0) -> None:
    config = EstimateConfig(
        model=ModelConfig(name=str(root / "model")),
        data=DataConfig(source=str(root / "text.jsonl")),
        factors=FactorsConfig(seed=seed),
        output=str(store),
    )
    run_estimate(config, World.start())


@pytest.fixture(scope="module")
def whole(root: Path) -> Callable[[str], tuple[dict[str, bytes], list[str]]]:
    """What an undisturbed run writes, and its passes, by what is asked; each is run once."""
    known: dict[str, tuple[dict[str, bytes], list[str]]] = {}

    def of(name: str) -> tuple[dict[str, bytes], list[str]]:
        if name not in known:
            output = root / f"whole {name}"
            with pytest.MonkeyPatch.context() as patch, watched(patch) as passes:
                ask(root, output, name)
            known[name] = content(output), passes
        return known[name]

    return of


def asked(root: Path, output: Path, name: str, **changes) -> QueryConfig:
    return QueryConfig(
        **{
            "factors": str(root / "store"),
            "queries": str(root / "queries.jsonl"),
            "scores": ScoresConfig(**ASKED[name]),
            "refine": REFINED.get(name, RefineConfig()),
            "batch_tokens": 100,
            "output": str(output),
            **changes,
        }
    )


def ask(root: Path, output: Path, name: str, **changes) -> list[str]:
    """Answers the queries; gives what was said."""
    with logged() as lines:
        run_query(asked(root, output, name, **changes), World.start())
    return lines


@contextmanager
def watched(
    monkeypatch: pytest.MonkeyPatch, on_pass: Callable[[list[str]], None] = lambda passes: None
) -> Iterator[list[str]]:
    """Lists the passes over data and queries; `on_pass` is told of each as it begins."""
    passes: list[str] = []
    run_pass = data_passes.run_pass

    def run(name: str, *arguments, **more):
        passes.append(name)
        on_pass(passes)
        return run_pass(name, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(data_passes, "run_pass", run)
        patch.setattr(gradients, "run_pass", run)
        yield passes


def over_data(passes: list[str]) -> list[str]:
    """Without those over queries, which are short and done again where they are needed."""
    return [name for name in passes if "queries" not in name]


def fails_in_pass(
    number: int, root: Path, output: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(passes: list[str]) -> None:
        if len(passes) == number:
            raise Failure

    with pytest.raises(Failure), watched(monkeypatch, fail):
        ask(root, output, name)


def fails_at_flush(
    number: int,
    root: Path,
    output: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException | None = None,
) -> bool:
    """Whether a run came as far as that flush to the disk, where it failed."""
    done, fsync = 0, os.fsync

    def count(file: int) -> None:
        nonlocal done
        done += 1
        if done == number:
            raise error or Failure
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", count)
        try:
            ask(root, output, name)
        except (Failure, OutputError):
            return True
    return False


def content(results: Path) -> dict[str, bytes]:
    """Every file's bytes; of the manifest, what does not tell the time or the output."""
    found = contents_in_bytes(results)
    manifest = json.loads(found.pop(MANIFEST))
    del manifest["seconds"], manifest["config"]["output"]
    return found | {MANIFEST: json.dumps(manifest).encode()}


def contents_in_bytes(results: Path) -> dict[str, bytes]:
    return {str(p.relative_to(results)): p.read_bytes() for p in results.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("two stages", "refined") else pytest.param(name, marks=pytest.mark.slow)
        for name in ASKED
    ],
)
def test_what_is_done_is_not_done_again_and_the_bytes_are_the_same(
    name: str, root: Path, tmp_path: Path, whole, monkeypatch: pytest.MonkeyPatch
):
    """The last pass of all fails: of the second block's scan, its details or its re-score."""
    wanted, passes = whole(name)
    fails_in_pass(len(passes), root, tmp_path / "scores", name, monkeypatch)
    with watched(monkeypatch) as again:
        said = ask(root, tmp_path / "scores", name)
    assert over_data(again) == passes[-1:]
    assert content(tmp_path / "scores") == wanted
    scored = 1 if passes[-1].startswith("scan") else 2
    assert any(line.startswith(f"goes on       {scored} of 2 blocks are scored") for line in said)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("exact", ["details (part 1)", "details (part 2)"]),
        ("two stages", ["re-score (part 2)", "re-score (part 3)"]),
    ],
)
def test_a_run_that_goes_on_with_smaller_blocks_keeps_what_is_done(
    name: str, left: list[str], root: Path, tmp_path: Path, whole, monkeypatch: pytest.MonkeyPatch
):
    """As of several workers that shared all rows' gradients, and of one that cannot hold them."""
    held = blocks.bytes_per_group
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "bytes_per_group", lambda *of: held(*of) // (3 if of[1] else 2))
        # After the scan of the one block, and where rows are scored again after the first of two.
        fails_in_pass(3 if name == "exact" else 5, root, tmp_path / "scores", name, patch)
    saved = {path.stem for path in (tmp_path / "scores" / "state").iterdir()}
    assert saved == {"scan-0-2"} | ({"rescore-0-0"} if name == "two stages" else set())
    with watched(monkeypatch) as again:
        ask(root, tmp_path / "scores", name)
    assert over_data(again) == left
    whole(name)
    for file in ("scores.safetensors", "details.safetensors"):
        found = load_file(tmp_path / "scores" / file)
        wanted = load_file(root / f"whole {name}" / file)
        assert found.keys() == wanted.keys()
        for key, values in found.items():
            assert relative(values.double(), wanted[key].double()) < 1e-5, key


@pytest.mark.slow
@pytest.mark.parametrize("name", ASKED)
def test_a_run_that_fails_in_any_pass_goes_on(
    name: str, root: Path, tmp_path: Path, whole, monkeypatch: pytest.MonkeyPatch
):
    wanted, passes = whole(name)
    for number in range(1, len(passes) + 1):
        output = tmp_path / str(number)
        fails_in_pass(number, root, output, name, monkeypatch)
        with watched(monkeypatch) as again:
            ask(root, output, name)
        assert over_data(again) == over_data(passes[number - 1 :]), passes[number - 1]
        assert content(output) == wanted, passes[number - 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ASKED)
def test_a_run_that_fails_at_any_flush_to_the_disk_goes_on(
    name: str, root: Path, tmp_path: Path, whole, monkeypatch: pytest.MonkeyPatch
):
    wanted, _ = whole(name)
    number = 1
    while fails_at_flush(number, root, tmp_path / str(number), name, monkeypatch):
        output = tmp_path / str(number)
        if not is_complete(output):
            # Once more, a little later, before it is left to end.
            fails_at_flush(3, root, output, name, monkeypatch)
        if not is_complete(output):
            ask(root, output, name)
        found = {f: c for f, c in content(output).items() if not f.startswith(("state", "journal"))}
        assert found == wanted, f"flush {number}"
        number += 1
    assert number > 15


def is_complete(output: Path) -> bool:
    try:
        ResultsReader(output)
    except StoreError:
        return False
    return True


def test_a_disk_that_is_full_at_the_end_loses_nothing(
    root: Path, tmp_path: Path, whole, monkeypatch: pytest.MonkeyPatch
):
    output, name = tmp_path / "scores", "all parts"
    wanted, _ = whole(name)
    write, full = Path.replace, OSError(errno.ENOSPC, "No space left on device")

    def replace(self: Path, target: Path) -> Path:
        if target.name == "details.safetensors":
            raise full
        return write(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(OutputError, match=r"details\.safetensors cannot be written: No space"):
            ask(root, output, name)
    with pytest.raises(StoreError, match=r"did not finish\. Run the same `query` again"):
        write_report(output, tmp_path / "page.html")
    with watched(monkeypatch) as again:
        said = ask(root, output, name)
    assert again == []
    assert content(output) == wanted
    assert "goes on       2 of 2 blocks are scored, 2 of 2 in detail" in said


def test_a_disk_that_is_too_small_is_told_before_the_work(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ekfac_dist.influence.unfinished.free_disk_bytes", lambda path: 5000)
    with (
        watched(monkeypatch) as passes,
        pytest.raises(OutputError, match=r"needs .* kept until the end, and 5\.0 kB are free"),
    ):
        ask(root, tmp_path / "scores", "all parts")
    assert not over_data(passes)
    assert not (tmp_path / "scores").exists()


def test_a_damaged_piece_is_computed_again_and_that_is_said(
    root: Path, tmp_path: Path, whole, monkeypatch: pytest.MonkeyPatch
):
    """That of the first block, which has the norms; the second's are whole."""
    output, name = tmp_path / "scores", "all parts"
    wanted, passes = whole(name)
    fails_in_pass(len(passes), root, output, name, monkeypatch)
    piece = output / "state" / "scan-0-1.safetensors"
    held = bytearray(piece.read_bytes())
    held[-1] ^= 4
    piece.write_bytes(held)
    with watched(monkeypatch) as again:
        said = ask(root, output, name)
    assert any("damaged       state/scan-0-1.safetensors has changed" in line for line in said)
    assert over_data(again) == ["scan 1/2", "details 2/2"]
    assert content(output) == wanted


def test_a_run_that_has_finished_no_piece_leaves_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "there").mkdir()
    before = contents(tmp_path)
    for output in ("there", "new/scores"):
        fails_in_pass(2, root, tmp_path / output, "exact", monkeypatch)
        assert contents(tmp_path) == before


def change_queries(root: Path) -> None:
    write_jsonl(root / "queries.jsonl", [*QUERIES[:3], {**QUERIES[3], "completion": " tokens"}])


def change_contrast(root: Path) -> None:
    write_jsonl(root / "queries.jsonl", [{**QUERIES[0], "against": " two rows"}, *QUERIES[1:]])


def change_data(root: Path) -> None:
    write_jsonl(root / "other.jsonl", [{"text": text} for text in texts(9, seed=4)])


def change_factors(root: Path) -> None:
    shutil.rmtree(root / "store")
    fit(root, root / "store", seed=1)


def change_candidates(root: Path) -> None:
    (root / "rows.txt").write_text("1 2 4")


def test_another_run_is_refused_by_what_changed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("queries.jsonl", "text.jsonl"):
        shutil.copy(root / name, tmp_path)
    shutil.copytree(root / "store", tmp_path / "store")
    (tmp_path / "model").symlink_to(root / "model")
    write_jsonl(tmp_path / "other.jsonl", [{"text": text} for text in texts(9, seed=3)])
    (tmp_path / "rows.txt").write_text("1 2 3")
    output = tmp_path / "scores"
    scores = ScoresConfig(query_memory_gb=TWO_ROWS, candidates=str(tmp_path / "rows.txt"), top_k=2)
    begun = {"scores": scores, "data": QueryDataConfig(source=str(tmp_path / "other.jsonl"))}

    def goes_on(**changes) -> None:
        ask(tmp_path, output, "exact", **begun | changes)

    with pytest.raises(Failure), watched(monkeypatch, fail_in_details):
        goes_on()
    before = contents(output)
    with pytest.raises(OutputError, match=r"of another configuration: damping\.value 0\.1 \(now"):
        goes_on(damping=DampingConfig(value=0.2))
    with pytest.raises(OutputError, match=r"refine\.method 'none' \(now 'cg'\)"):
        goes_on(refine=RefineConfig(method="cg"))
    other = ScoresConfig(**{**vars(scores), "normalize": "cosine"})
    with pytest.raises(OutputError, match=r"scores\.normalize 'none' \(now 'cosine'\)"):
        goes_on(scores=other)
    other = ScoresConfig(**{**vars(scores), "tokens": "outputs"})
    with pytest.raises(OutputError, match=r"scores\.tokens 'inputs' \(now 'outputs'\)"):
        goes_on(scores=other)
    for change, says in (
        (change_candidates, r"began with another candidates \(\w{12}…, now \w{12}…\)"),
        (change_queries, "began with another queries"),
        (change_contrast, "began with another queries"),
        (change_data, "began with another data"),
        (change_factors, "began with another factors"),
    ):
        kept = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
        change(tmp_path)
        with pytest.raises(OutputError, match=f"{says}.*remove this one"):
            goes_on()
        assert contents(output) == before
        for path, held in kept.items():
            path.write_bytes(held)
    shutil.rmtree(tmp_path / "store")
    shutil.copytree(root / "store", tmp_path / "store")
    goes_on()
    with pytest.raises(OutputError, match="exists already"):
        goes_on()


def fail_in_details(passes: list[str]) -> None:
    if passes[-1].startswith("details"):
        raise Failure


def test_two_runs_cannot_write_to_one_output(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "scores"

    def second(passes: list[str]) -> None:
        with pytest.raises(OutputError, match=f"being written by another run .*{os.getpid()}"):
            ask(root, output, "exact")
        raise Failure

    with pytest.raises(Failure), watched(monkeypatch, second):
        ask(root, output, "exact")
    output.mkdir()
    lock = DirectoryLock(output)  # of one that has written nothing yet
    with pytest.raises(OutputError, match="being written by another run"):
        ask(root, output, "exact")
    lock.release()


def test_sigterm_ends_a_run_that_goes_on(
    root: Path,
    tmp_path: Path,
    whole,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
):
    output, name = tmp_path / "scores", "exact"
    wanted, _ = whole(name)

    def end(passes: list[str]) -> None:
        if passes[-1] == "scan 2/2":
            os.kill(os.getpid(), signal.SIGTERM)

    given = ["query", "--factors", root / "store", "--queries", root / "queries.jsonl"]
    given += ["--output", output, "--batch_tokens", "100"]
    given += ["--scores.query_memory_gb", TWO_ROWS]
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(preemption, "_is_requested", False)
    try:
        with watched(monkeypatch, end):
            assert cli.main([*map(str, given)]) == 143
    finally:
        signal.signal(signal.SIGTERM, handler)
    said = capfd.readouterr().err
    assert "Ended by SIGTERM; blocks of queries that are finished are stored: run the same" in said
    monkeypatch.setattr(preemption, "_is_requested", False)
    with watched(monkeypatch) as again:
        ask(root, output, name)
    assert over_data(again) == ["scan 2/2", "details 2/2"]
    assert content(output) == wanted
