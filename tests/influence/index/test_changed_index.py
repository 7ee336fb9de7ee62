"""An index that has changed in any way is refused, with the file named, or is as good as before."""

import hashlib
import json
import random
import shutil
import struct
from pathlib import Path

import numpy as np
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
from helpers.made_indices import arguments, make_store
from helpers.workshop import run_here

from ekfac_dist import load_factors
from ekfac_dist.errors import StoreError
from ekfac_dist.factors.layout import CHECKSUM, MANIFEST, manifest_checksum
from ekfac_dist.influence.index import layout
from ekfac_dist.influence.index.reader import GradientIndex


def add(index: Path, draw: random.Random) -> list[str]:
    (index / draw.choice(["a.safetensors", "shard-99999.safetensors", ".lock"])).write_bytes(b"x")
    return []


def hostile(index: Path, draw: random.Random) -> list[str]:
    """A file that is no shard, listed in the manifest as if it were."""
    file = draw.choice([f for f in stored(index) if f != MANIFEST])
    whole = (index / file).read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    name = draw.choice(list(header))
    data = whole[8 + size :]
    kind = draw.randrange(6)
    if kind == 0:
        content = struct.pack("<Q", draw.choice([0, 2**63, len(whole)])) + whole[8:]
    else:
        entry = header[name]
        if kind == 1:
            entry["data_offsets"] = [0, 2**60]
        elif kind == 2:
            entry["dtype"] = draw.choice(["I32", "F16", "BOOL", ""])
        elif kind == 3:
            entry["shape"] = draw.choice([[2**40, 2**40], [], [0], [1], [-1, 4]])
        elif kind == 4:
            header["other"] = header.pop(name)
        else:
            header = {name: [entry]}
        text = json.dumps(header).encode()
        content = struct.pack("<Q", len(text)) + text + data
    (index / file).write_bytes(content)
    manifest = json.loads((index / MANIFEST).read_text())
    for listed in manifest["shards"]:
        if listed["file"] == file:
            listed |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest[CHECKSUM] = manifest_checksum(manifest)
    (index / MANIFEST).write_text(json.dumps(manifest))
    return [file]


CHANGES = [cut, lengthen, flip, scribble, swap, copy_over, remove, add, edit, hostile]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = make_store(tmp_path_factory.mktemp("corruption"))
    assert run_here(arguments(root, root / "index")).returncode == 0
    return root


def used(path: Path, root: Path) -> dict[str, torch.Tensor]:
    """Everything that is read of an index."""
    index = GradientIndex(path, load_factors(root / "store"))
    index.check_shards(0, 1)
    read = {"indices": torch.from_numpy(np.array(index.indices))}
    read["norms"] = torch.cat([norms.clone() for norms in index.norms()])
    means = index.manifest["norms"]["mean_lambda"].values()
    read["means"] = torch.tensor(list(means), dtype=torch.float64)
    for shard in index.shards:
        with index.open(shard) as opened:
            for module in index.modules:
                for key in (layout.left_key(module.name), layout.right_key(module.name)):
                    read[f"{shard.number} {key}"] = opened.tensor(key).clone()
    return read


def check(numbers: range, root: Path, folder: Path) -> None:
    wanted, refused = used(root / "index", root), 0
    for number in numbers:
        draw = random.Random(number)
        changed = shutil.copytree(root / "index", folder / str(number))
        change = CHANGES[number % len(CHANGES)]
        files = change(changed, draw)
        what = f"{number}: {change.__name__} {files}"
        found, said = None, ""
        try:
            found = used(changed, root)
        except StoreError as error:
            said = str(error)
        if found is None:
            assert any(file in said for file in [*files, str(changed)]), f"{what}: {said}"
            refused += 1
        else:
            assert found.keys() == wanted.keys(), what
            assert all(torch.equal(found[name], wanted[name]) for name in wanted), what
        shutil.rmtree(changed)
    assert refused > 0.8 * len(numbers)


def test_an_index_that_has_changed_is_refused_or_as_good(root, tmp_path):
    check(range(60), root, tmp_path)


@pytest.mark.slow
def test_five_hundred_changes_of_an_index_are_refused_or_as_good(root, tmp_path):
    check(range(1000, 1500), root, tmp_path)
