"""The directory of results that are under way: what it takes up again, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch

from ekfac_dist.errors import OutputError, StoreError
from ekfac_dist.influence.results import MANIFEST, ResultsReader
from ekfac_dist.influence.unfinished import UnfinishedResults

CONFIG = {"batch_tokens": 16, "output": "a", "model": {"dtype": None, "device_map": None}}
BEGINS = {
    "model": "m" * 64,
    "factors": "f" * 64,
    "damping": {"h.0.up": 0.1, "h.0.down": 3e-5},
    "software": {"torch": "2.13"},
}
PIECE = {"scores": torch.arange(6.0).view(2, 3), "query_losses": torch.ones(2).double()}


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run that was interrupted after its first piece."""
    directory = UnfinishedResults(tmp_path / "a", CONFIG, BEGINS)
    directory.write("scan-1", PIECE)
    directory.close()
    return tmp_path / "a"


def test_a_piece_is_there_again_for_the_same_run(begun: Path):
    other = {**CONFIG, "output": "b", "model": {"dtype": None, "device_map": "auto"}}
    directory = UnfinishedResults(begun, other, BEGINS)
    assert directory.drop_damaged(lambda num_bytes: None) == []
    found = directory.read("scan-1")
    assert {name: held.dtype for name, held in found.items()} == {
        "scores": torch.float32,
        "query_losses": torch.float64,
    }
    assert all(torch.equal(found[name], PIECE[name]) for name in PIECE)
    writer = directory.writer()
    writer.tensors("scores.safetensors", PIECE)
    writer.finish({"config": other})
    directory.finish()
    assert sorted(path.name for path in begun.iterdir()) == [MANIFEST, "scores.safetensors"]
    assert set(ResultsReader(begun).tensors("scores.safetensors")) == set(PIECE)


@pytest.mark.parametrize(
    ("config", "begins", "says"),
    [
        ({"batch_tokens": 17}, {}, r"another configuration: batch_tokens 16 \(now 17\)"),
        ({"new": None, "batch_tokens": 1}, {}, r"batch_tokens 16 \(now 1\)"),
        ({}, {"model": "n" * 64}, r"another model \(m{12}…, now n{12}…\)"),
        ({}, {"factors": "g" * 64}, "another factors"),
        ({}, {"software": {"torch": "2.14"}}, r"another software\.torch \(2\.13, now 2\.14\)"),
        (
            {},
            {"damping": {**BEGINS["damping"], "h.0.down": 3.001e-5}},
            r"another damping\.h\.0\.down \(3e-05, now 3\.001e-05\)",
        ),
        ({}, {"damping": {"h.0.up": 0.1}}, r"another damping\.h\.0\.down \(3e-05, now None\)"),
    ],
)
def test_another_run_is_refused_by_what_changed(begun: Path, config: dict, begins: dict, says: str):
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match=f"{says}.*; give another directory, or remove this one"):
        UnfinishedResults(begun, CONFIG | config, BEGINS | begins)
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == before


def test_damping_is_compared_to_rounding(begun: Path):
    """Its mean may be summed in another order on another machine."""
    rounded = {name: value * (1 + 1e-15) for name, value in BEGINS["damping"].items()}
    assert rounded != BEGINS["damping"]
    directory = UnfinishedResults(begun, CONFIG, BEGINS | {"damping": rounded})
    assert set(directory.pieces) == {"scan-1"}
    directory.close()


def test_a_journal_that_is_damaged_is_refused_by_its_line(begun: Path):
    directory = UnfinishedResults(begun, CONFIG, BEGINS)
    directory.write("scan-2", PIECE)
    directory.close()
    journal = begun / "journal.jsonl"
    held = bytearray(journal.read_bytes())
    held[25] ^= 1
    journal.write_bytes(held)
    with pytest.raises(StoreError, match=r"damaged in line 1.*Remove the directory, or give"):
        UnfinishedResults(begun, CONFIG, BEGINS)
    assert journal.read_bytes() == held
    assert (begun / "state" / "scan-1.safetensors").exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_piece_that_is_damaged_is_given_up(begun: Path, damage: str):
    piece = begun / "state" / "scan-1.safetensors"
    held = bytearray(piece.read_bytes())
    held[-1] ^= 1
    piece.write_bytes(held[:-3] if damage == "cut" else held)
    if damage == "remove":
        piece.unlink()
    directory = UnfinishedResults(begun, CONFIG, BEGINS)
    assert directory.drop_damaged(lambda num_bytes: None) == ["state/scan-1.safetensors"]
    assert directory.pieces == {}
    directory.write("scan-1", PIECE)
    directory.close()
    directory = UnfinishedResults(begun, CONFIG, BEGINS)
    assert directory.drop_damaged(lambda num_bytes: None) == []
    directory.close()


def test_what_a_run_leaves_that_was_killed_before_its_manifest_is_begun_anew(tmp_path: Path):
    (tmp_path / ".lock").write_text(json.dumps([1, "nowhere"]))
    (tmp_path / ".manifest.json.1.tmp").write_text("{")
    directory = UnfinishedResults(tmp_path, CONFIG, BEGINS)
    directory.write("scan-1", PIECE)
    directory.close()
    assert not json.loads((tmp_path / MANIFEST).read_text())["complete"]
