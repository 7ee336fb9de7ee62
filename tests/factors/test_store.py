"""What is written is read again, whole or not at all; what is damaged or foreign is refused."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.workshop import rewrite_manifest
from safetensors.torch import load_file, save_file

from ekfac_dist.errors import OutputError, StoreError
from ekfac_dist.factors import reader as store_module
from ekfac_dist.factors.layout import (
    CHECKSUM,
    FOLDERS,
    MANIFEST,
    MANIFEST_KEYS,
    covariance_file,
    eigenbasis_file,
    spectrum_file,
)
from ekfac_dist.factors.output import check_output
from ekfac_dist.factors.reader import StoreReader
from ekfac_dist.factors.sinks import MemoryStore, NullStore
from ekfac_dist.factors.writer import StoreWriter
from ekfac_dist.runtime.journal import JOURNAL
from ekfac_dist.runtime.lock import LOCK

CONFIG = {"model": {"name": "tiny"}, "output": "here", "batch_tokens": 4096, "modules": None}
BASIS, SUM, SPECTRUM = eigenbasis_file("a.input"), covariance_file("a.input"), spectrum_file("a")
HEADER = {"count": "12", "residual": "1e-15"}


def tensors(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    return {
        SUM: {"sum": normal(4, 4)},
        BASIS: {
            "eigenvectors": normal(4, 4).T,  # not contiguous
            "eigenvalues": normal(4, dtype=torch.float64),
        },
        SPECTRUM: {"lambda": normal(3, 4, dtype=torch.float64)},
    }


def entries() -> dict[str, Any]:
    return {key: {} for key in MANIFEST_KEYS if key not in ("files", "config")} | {"config": CONFIG}


def write(path: Path) -> Path:
    writer = StoreWriter(path, CONFIG)
    for file, held in tensors().items():
        writer.write(file, held, HEADER if file == BASIS else None)
    writer.finish(entries())
    return path


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Changes a store's manifest, and seals it again."""
    rewrite_manifest(path, change)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write(tmp_path / "store")


def files(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}


# -- whole -----------------------------------------------------------------------------------------


def test_what_is_written_is_read_again_bit_for_bit(store: Path):
    reader = StoreReader(store)
    for file, held in tensors().items():
        for key, tensor in held.items():
            read = reader.tensor(file, key, tuple(tensor.shape))
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)
    assert reader.header(BASIS) == HEADER
    assert reader.header(SUM) == {}
    assert reader.manifest["config"] == CONFIG


def test_safetensors_and_json_alone_read_a_store(store: Path):
    assert torch.equal(load_file(store / SUM)["sum"], tensors()[SUM]["sum"])
    manifest = json.loads((store / MANIFEST).read_text())
    assert (manifest["format"], manifest["complete"]) == ("ekfac_dist/1", True)
    assert set(manifest["files"]) == set(tensors())


def test_the_files_are_those_that_the_manifest_lists_and_no_other(store: Path):
    assert files(store) == {MANIFEST, *tensors()}
    reader = StoreReader(store)
    assert list(reader.verify()) == [(file, None) for file in sorted(tensors())]
    assert reader.total_bytes() == sum((store / file).stat().st_size for file in files(store))


def test_the_same_run_writes_the_same_bytes(store: Path, tmp_path: Path):
    again = write(tmp_path / "again")
    for file in files(store):
        assert (again / file).read_bytes() == (store / file).read_bytes()


def test_a_store_kept_in_memory_copies_to_the_same_bytes(store: Path, tmp_path: Path):
    memory = MemoryStore()
    for file, held in tensors().items():
        memory.write(file, held, HEADER if file == BASIS else None)
    memory.finish(entries())
    assert torch.equal(memory.tensor(SUM, "sum", (4, 4)), tensors()[SUM]["sum"])
    assert memory.header(BASIS) == HEADER
    memory.copy_to(StoreWriter(tmp_path / "copy", CONFIG))
    for file in files(store):
        assert (tmp_path / "copy" / file).read_bytes() == (store / file).read_bytes()


def test_a_store_kept_in_memory_does_not_follow_its_tensors():
    memory, tensor = MemoryStore(), torch.zeros(2)
    memory.write(SUM, {"sum": tensor})
    tensor += 1
    assert torch.equal(memory.tensor(SUM, "sum", (2,)), torch.zeros(2))


def test_other_workers_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    sink = NullStore()
    sink.write(SUM, tensors()[SUM], HEADER)
    sink.finish(entries())
    assert not files(tmp_path)


# -- whole or not at all ---------------------------------------------------------------------------


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_no_file_and_no_temporary_one(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    writer = StoreWriter(tmp_path / "store", CONFIG)
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), no_room)
        with pytest.raises(OutputError, match=r"a\.input\.safetensors cannot be written: No space"):
            writer.write(SUM, tensors()[SUM])
    assert files(tmp_path) == before
    assert SUM not in writer.files


def test_an_interrupted_write_leaves_the_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    writer = StoreWriter(tmp_path / "store", CONFIG)
    writer.write(SUM, tensors()[SUM])
    before = (tmp_path / "store" / SUM).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            writer.write(SUM, tensors(seed=1)[SUM])
    assert (tmp_path / "store" / SUM).read_bytes() == before
    assert files(tmp_path / "store") == {MANIFEST, JOURNAL, LOCK, SUM}


def test_a_store_is_incomplete_until_it_is_finished(tmp_path: Path):
    writer = StoreWriter(tmp_path, CONFIG)
    for file, held in tensors().items():
        with pytest.raises(StoreError, match=r"incomplete.*Run `estimate` again"):
            StoreReader(tmp_path)
        writer.write(file, held)
    with pytest.raises(StoreError, match="incomplete"):
        StoreReader(tmp_path)
    writer.finish(entries())
    assert StoreReader(tmp_path).manifest["complete"] is True


def test_a_manifest_that_cannot_be_finished_leaves_the_store_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    writer = StoreWriter(tmp_path, CONFIG)
    monkeypatch.setattr(Path, "replace", no_room)
    with pytest.raises(OutputError, match=r"manifest\.json cannot be written"):
        writer.finish(entries())
    with pytest.raises(StoreError, match="incomplete"):
        StoreReader(tmp_path)


def test_no_number_that_json_lacks_gets_into_a_manifest(tmp_path: Path):
    writer = StoreWriter(tmp_path, CONFIG)
    with pytest.raises(ValueError, match="JSON"):
        writer.finish(entries() | {"passes": {"refit": {"loss": float("nan")}}})
    with pytest.raises(StoreError, match="incomplete"):
        StoreReader(tmp_path)


# -- outputs ---------------------------------------------------------------------------------------


def begun(path: Path) -> None:
    writer = StoreWriter(path, CONFIG)
    writer.write(SUM, tensors()[SUM])
    writer.close()
    (path / "covariance/.a.safetensors.99.tmp").write_bytes(b"killed while writing")
    (path / ".manifest.json.99.tmp").write_bytes(b"killed while finishing")


def killed_at_once(path: Path) -> None:
    for folder in FOLDERS:
        (path / folder).mkdir(parents=True)
    (path / ".manifest.json.99.tmp").write_bytes(b"killed before it was renamed")


def test_a_run_that_began_with_something_else_is_refused_by_its_name(tmp_path: Path):
    StoreWriter(tmp_path, CONFIG, {"task": "CausalLM", "data": "a" * 64}).close()
    with pytest.raises(OutputError, match=r"began with another data .a{12}…, now b{12}….; give"):
        StoreWriter(tmp_path, CONFIG, {"task": "CausalLM", "data": "b" * 64})
    with pytest.raises(OutputError, match=r"began with another task .CausalLM, now MaskedLM."):
        StoreWriter(tmp_path, CONFIG, {"task": "MaskedLM", "data": "a" * 64})
    StoreWriter(tmp_path, CONFIG, {"task": "CausalLM", "data": "a" * 64}).close()


def test_an_output_that_is_being_written_is_refused(tmp_path: Path):
    writer = StoreWriter(tmp_path, CONFIG)
    for refuse in (check_output, StoreWriter):
        with pytest.raises(OutputError, match=r"is being written by another run .process"):
            refuse(tmp_path, CONFIG)
        with pytest.raises(OutputError, match="is being written by another run"):
            refuse(tmp_path, CONFIG, replace=True)
    writer.close()
    check_output(tmp_path, CONFIG)


def test_states_that_other_hosts_workers_left_are_no_obstacle(tmp_path: Path):
    (tmp_path / "state" / "covariance-1-of-2" / "0-1-3").mkdir(parents=True)
    check_output(tmp_path, CONFIG)
    (tmp_path / "state" / "of mind").mkdir()
    with pytest.raises(OutputError, match=r"no factor store .it holds state"):
        check_output(tmp_path, CONFIG)


def linked(path: Path) -> None:
    (path.parent / "elsewhere").mkdir()
    path.symlink_to("elsewhere")


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, linked, begun, killed_at_once])
def test_an_output_that_is_new_or_of_the_same_run_is_taken(
    make: Callable[[Path], object], tmp_path: Path
):
    path = tmp_path / "store"
    make(path)
    check_output(path, CONFIG)
    write(path)
    assert files(path) == {MANIFEST, *tensors()}
    assert all(fault is None for _, fault in StoreReader(path).verify())


def test_an_output_may_be_several_directories_away(tmp_path: Path):
    check_output(tmp_path / "one" / "two" / "three", CONFIG)
    assert not files(tmp_path)
    write(tmp_path / "one" / "two" / "three")


def finished(path: Path) -> None:
    write(path)


def of_another_run(path: Path) -> None:
    StoreWriter(path, CONFIG | {"batch_tokens": 1}).close()


def manifest_only(text: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        (path / MANIFEST).write_text(text)

    return make


def foreign(name: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        (path / name).parent.mkdir(parents=True)
        (path / name).write_text("the only copy")

    return make


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "finished": (finished, "holds a finished factor store already"),
    "another run": (of_another_run, "another run, unfinished and of another configuration"),
    "another format": (manifest_only('{"format": "ekfac_dist/0"}'), "is no ekfac_dist/1 store"),
    "no JSON": (manifest_only('{"format'), "no manifest can be read from it.*is not JSON"),
    "no object": (manifest_only("[1]"), "no manifest can be read from it.*is no JSON object"),
    "nested deeply": (manifest_only("[" * 200_000), "no manifest can be read from it"),
    "foreign": (foreign("thesis.tex"), "is no factor store .it holds thesis.tex.; give"),
    "hidden": (foreign(".git/config"), "is no factor store"),
    "a folder that is not empty": (foreign("spectrum/mine.txt"), "is no factor store"),
    "a file": (lambda path: path.write_text("the only copy"), "is a file"),
    "a dangling link": (lambda path: path.symlink_to("gone"), "is a link to gone"),
    "a manifest that is a directory": (
        lambda path: (path / MANIFEST).mkdir(parents=True),
        "is no factor store",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_output_that_holds_anything_else_is_refused_and_left_as_it_was(
    name: str, tmp_path: Path
):
    make, says = REFUSED[name]
    path = tmp_path / "store"
    make(path)
    before = {file: (tmp_path / file).read_bytes() for file in files(tmp_path)}
    for refuse in (check_output, StoreWriter):
        with pytest.raises(OutputError, match=says):
            refuse(path, CONFIG)
    assert {file: (tmp_path / file).read_bytes() for file in files(tmp_path)} == before


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Permissions are told by the system; the tests may run as one who has them all."""
    (tmp_path / "old").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="no directory that can be written"):
        check_output(tmp_path / "new", CONFIG)
    with pytest.raises(OutputError, match="old cannot be written; give another directory"):
        check_output(tmp_path / "old", CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_an_output_below_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("the only copy")
    with pytest.raises(OutputError, match="file is no directory that can be written"):
        check_output(tmp_path / "file" / "store", CONFIG)


def test_a_folder_that_is_lost_while_writing_is_told(tmp_path: Path):
    writer = StoreWriter(tmp_path, CONFIG)
    (tmp_path / "spectrum").rmdir()
    (tmp_path / "spectrum").write_text("a file in its place")
    with pytest.raises(OutputError, match=r"a\.safetensors cannot be written: Not a directory"):
        writer.write(SPECTRUM, tensors()[SPECTRUM])


# -- damaged stores --------------------------------------------------------------------------------


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_file_cut_short_is_refused_with_both_sizes(store: Path):
    whole = (store / SUM).read_bytes()
    (store / SUM).write_bytes(whole[:-1])
    with pytest.raises(StoreError, match=rf"{len(whole) - 1} bytes.*says {len(whole)}: it is dam"):
        StoreReader(store).tensor(SUM, "sum", (4, 4))
    assert (SUM, f"has {len(whole) - 1} bytes, not {len(whole)}") in StoreReader(store).verify()


def test_a_flipped_bit_among_the_numbers_is_found_by_verification(store: Path):
    flip(store / SUM, -1)
    faults = dict(StoreReader(store).verify())
    assert faults[SUM] == "has another SHA-256: its content has changed"
    assert [fault for file, fault in faults.items() if file != SUM] == [None, None]


def test_a_flipped_bit_in_the_files_own_header_is_refused(store: Path):
    flip(store / SUM, 9)
    with pytest.raises(StoreError, match="no whole safetensors file"):
        StoreReader(store).tensor(SUM, "sum", (4, 4))


def test_a_missing_file_is_refused(store: Path):
    (store / SUM).unlink()
    with pytest.raises(StoreError, match="is missing, though the manifest lists it"):
        StoreReader(store).tensor(SUM, "sum", (4, 4))
    assert dict(StoreReader(store).verify())[SUM] == "is missing"


def test_a_directory_in_a_files_place_is_refused(store: Path):
    (store / SUM).unlink()
    (store / SUM).mkdir()
    rewrite(store, lambda m: m["files"][SUM].update(bytes=(store / SUM).stat().st_size))
    with pytest.raises(StoreError, match="no whole safetensors file"):
        StoreReader(store).tensor(SUM, "sum", (4, 4))


def test_an_unlisted_file_is_told_and_never_read(store: Path):
    (store / "covariance/b.input.safetensors").write_bytes((store / SUM).read_bytes())
    reader = StoreReader(store)
    faults = dict(reader.verify())
    assert faults["covariance/b.input.safetensors"] == "is not listed in the manifest"
    with pytest.raises(StoreError, match=r"does not list covariance/b\.input\.safetensors"):
        reader.tensor("covariance/b.input.safetensors", "sum", (4, 4))


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ({"total": torch.zeros(4, 4)}, "holds no tensor 'sum'"),
        ({"sum": torch.zeros(4, 5)}, r"shape \[4, 5\]; the manifest's modules say \[4, 4\]"),
        ({"sum": torch.zeros(16)}, r"shape \[16\]"),
        ({"sum": torch.zeros(4, 4, dtype=torch.float16)}, "float16; float32 or float64 only"),
        ({"sum": torch.zeros(4, 4, dtype=torch.int64)}, "int64; float32 or float64 only"),
    ],
)
def test_a_file_that_holds_another_tensor_is_refused(
    held: dict[str, torch.Tensor], says: str, store: Path
):
    save_file(held, store / SUM)
    rewrite(store, lambda m: m["files"][SUM].update(bytes=(store / SUM).stat().st_size))
    with pytest.raises(StoreError, match=says):
        StoreReader(store).tensor(SUM, "sum", (4, 4))


def test_a_pickle_in_a_files_place_is_not_read(store: Path):
    torch.save({"sum": torch.zeros(4, 4)}, store / SUM)
    rewrite(store, lambda m: m["files"][SUM].update(bytes=(store / SUM).stat().st_size))
    with pytest.raises(StoreError, match="no whole safetensors file"):
        StoreReader(store).tensor(SUM, "sum", (4, 4))


# -- hostile manifests -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(format="ekfac_dist/2"), "format 'ekfac_dist/2'; .* 'ekfac_dist/1'"),
        (lambda m: m.pop("format"), "format None"),
        (lambda m: m.update(complete=False), "incomplete"),
        (lambda m: m.update(complete="yes"), "incomplete"),
        (lambda m: m.pop("modules"), r"manifest\.json lacks modules"),
        (
            lambda m: m.pop(CHECKSUM),
            r"manifest\.json is damaged or was edited: .*no checksum",
        ),
        (lambda m: m.update(files=[]), "lacks files"),
        (lambda m: m.update(model=None, data=3), "lacks model, data"),
        (lambda m: m["files"].update({SUM: 3}), "as 3; it must list"),
        (lambda m: m["files"].update({SUM: {"bytes": "12", "sha256": ""}}), "it must list"),
        (lambda m: m["files"].update({SUM: {"bytes": 12}}), "it must list"),
        (lambda m: listed(m, "/etc/passwd"), "lists '/etc/passwd'"),
        (lambda m: listed(m, "covariance/../../../etc/passwd"), "it must list files in"),
        (lambda m: listed(m, "../other/covariance/a.safetensors"), "it must list files in"),
        (lambda m: listed(m, ""), "it must list files in"),
        (lambda m: listed(m, "manifest.json"), "it must list files in"),
    ],
)
def test_a_manifest_that_is_no_manifest_is_refused(
    change: Callable[[dict[str, Any]], object], says: str, store: Path
):
    rewrite(store, change)
    with pytest.raises(StoreError, match=says):
        StoreReader(store)


def listed(manifest: dict[str, Any], file: str) -> None:
    manifest["files"][file] = {"bytes": 1, "sha256": ""}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b'{"format": "ekfac', "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b"null", "is no JSON object"),
        (b'"ekfac_dist/1"', "is no JSON object"),
    ],
    ids=["empty", "binary", "cut short", "nested deeply", "null", "text"],
)
def test_a_manifest_that_is_no_json_is_refused(content: bytes, says: str, store: Path):
    (store / MANIFEST).write_bytes(content)
    with pytest.raises(StoreError, match=says):
        StoreReader(store)


def test_what_is_no_store_is_refused(tmp_path: Path):
    with pytest.raises(StoreError, match="gone is no directory; give the output of an `estimate`"):
        StoreReader(tmp_path / "gone")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file is no directory"):
        StoreReader(tmp_path / "file")
    with pytest.raises(StoreError, match=r"has no manifest\.json"):
        StoreReader(tmp_path)


def test_opening_a_store_reads_no_tensor(store: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(store_module, "safe_open", refuse)
    assert StoreReader(store).manifest["complete"] is True
