"""A store that has changed in any way is refused, with the file named, or is as good as before."""

import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.corruptions import (
    copy_over,
    cut,
    edit,
    flip,
    lengthen,
    remove,
    scribble,
    stored,
    swap,
)
from helpers.networks import build, examples

from ekfac_dist import estimate_factors, load_factors
from ekfac_dist.errors import StoreError
from ekfac_dist.factors.layout import CHECKSUM, MANIFEST, manifest_checksum


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build("llama")


@pytest.fixture(scope="module")
def store(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corruption") / "store"
    estimate_factors(model, examples(4), output=path)
    return path


def used(store: Path, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Everything that can be read of a store, and a solve with it."""
    factors = load_factors(store, model=model)
    read = {}
    for name, module in factors.modules.items():
        one = torch.ones(module.num_outputs, module.input_size, dtype=torch.float64)
        fitted = factors.module(name)
        read[name] = torch.cat(
            [
                factors.solve({name: one})[name].flatten(),
                fitted.basis_OO.flatten(),
                fitted.basis_II.flatten(),
                fitted.lambda_OI.flatten(),
            ]
        )
    numbers = factors.manifest["data"]["num_sequences"], factors.manifest["fisher"]["seed"]
    return read | {"numbers": torch.tensor(numbers)}


# Each changes a store, and says which files may be named.


def add(store: Path, draw: random.Random) -> list[str]:
    folder = draw.choice(["", "covariance", "eigenbasis", "spectrum"])
    (store / folder / draw.choice(["a.safetensors", "journal.jsonl", ".lock"])).write_bytes(b"mine")
    return []


def hostile(store: Path, draw: random.Random) -> list[str]:
    """A file that is no factor, listed in the manifest as if it were."""
    file = draw.choice([f for f in stored(store) if f != MANIFEST and "covariance" not in f])
    whole = (store / file).read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    name = draw.choice([key for key in header if key != "__metadata__"])
    data = whole[8 + size :]
    kind = draw.randrange(8)
    if kind == 0:
        content = struct.pack("<Q", draw.choice([0, 2**63, len(whole), 100_000_001])) + whole[8:]
    elif kind == 1:
        content = struct.pack("<Q", 8) + b"[" * 8 + data
    else:
        entry = header[name]
        if kind == 2:
            entry["data_offsets"] = [0, 2**60]
        elif kind == 3:
            entry["data_offsets"] = [-8, entry["data_offsets"][1]]
        elif kind == 4:
            entry["dtype"] = draw.choice(["I32", "F16", "BOOL", "F128", ""])
        elif kind == 5:
            entry["shape"] = draw.choice([[2**40, 2**40], [], [0], [1], [-1, 4], ["a"]])
        elif kind == 6:
            header["other"] = header.pop(name)
        else:
            header = {name: [entry], "__metadata__": {"a": 3}}
        text = json.dumps(header).encode()
        content = struct.pack("<Q", len(text)) + text + data
    (store / file).write_bytes(content)
    manifest = json.loads((store / MANIFEST).read_text())
    digest = hashlib.sha256(content).hexdigest()
    manifest["files"][file] = {"bytes": len(content), "sha256": digest}
    manifest[CHECKSUM] = manifest_checksum(manifest)
    (store / MANIFEST).write_text(json.dumps(manifest))
    return [file]


CHANGES: list[Callable[[Path, random.Random], list[str]]] = [
    cut,
    lengthen,
    flip,
    scribble,
    swap,
    copy_over,
    remove,
    add,
    edit,
    hostile,
]


def is_refused_or_as_good(
    number: int, store: Path, model: torch.nn.Module, folder: Path, wanted: dict[str, torch.Tensor]
) -> bool:
    """Whether a change was refused; fails where it was neither refused nor harmless."""
    draw = random.Random(number)
    changed = shutil.copytree(store, folder / str(number))
    change = CHANGES[number % len(CHANGES)]
    files = change(changed, draw)
    what = f"{number}: {change.__name__} {files}"
    found, said = None, ""
    try:
        found = used(changed, model)
    except StoreError as error:
        said = str(error)
    finally:
        shutil.rmtree(changed)
    if found is None:
        assert any(file in said for file in files), f"{what}: {said}"
        return True
    assert found.keys() == wanted.keys(), what
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items()), what
    return False


def check(numbers: range, store: Path, model: torch.nn.Module, folder: Path) -> None:
    wanted = used(store, model)
    refused = [is_refused_or_as_good(n, store, model, folder, wanted) for n in numbers]
    # What is harmless: another file, or layout, or a covariance, which no query reads.
    assert sum(refused) > 0.5 * len(refused)


def test_a_store_that_has_changed_is_refused_or_as_good(
    store: Path, model: torch.nn.Module, tmp_path: Path
):
    check(range(100), store, model, tmp_path)


@pytest.mark.slow
def test_a_thousand_changes_of_a_store_are_refused_or_as_good(
    store: Path, model: torch.nn.Module, tmp_path: Path
):
    check(range(1000, 2000), store, model, tmp_path)
