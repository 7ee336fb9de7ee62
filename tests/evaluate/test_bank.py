"""The bank: what it keeps, what it refuses, and that no subset is trained on twice."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ekfac_dist.errors import ConfigError, Preempted, StoreError
from ekfac_dist.evaluate.bank import Bank, BankKey, fill
from ekfac_dist.evaluate.training import Trained
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.processes import World

KEY = BankKey({"epochs": 4, "learning_rate": 5e-4}, 0, "a" * 64, "b" * 64, "c" * 64)
SUBSETS = np.random.default_rng(0).random((5, 9)) < 0.5


@pytest.fixture
def bank(tmp_path):
    return Bank(tmp_path / "bank", KEY)


@pytest.fixture
def world():
    return World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), backend="none")


def losses_of(kept):
    return np.flatnonzero(kept)[:3] + kept.sum() / 7


def retrain_into(seen):
    def retrain(kept, on_step):
        on_step()
        seen.append(kept.copy())
        return losses_of(kept), Trained(1, 2.0, 1.0)

    return retrain


def filled(bank, world, subsets=SUBSETS):
    seen = []
    fill(bank, subsets, world, retrain_into(seen), lambda kept: 1, "bank")
    return seen


def test_what_is_put_is_read_again_to_the_bit(bank):
    losses = np.array([1 / 3, 1e-300, 12345.678])
    bank.put(SUBSETS[0], losses, Trained(7, 0.1 + 0.2, 1 / 7), 1.5)
    again = Bank(bank.path, KEY)
    assert again.has(SUBSETS[0])
    assert not again.has(SUBSETS[1])
    assert again.losses(SUBSETS[:1]).tolist() == [losses.tolist()]
    assert again.trained(SUBSETS[0]) == Trained(7, 0.1 + 0.2, 1 / 7)
    assert again.seconds(SUBSETS[:1]) == 1.5


def test_each_subset_is_trained_on_once(bank, world):
    first = filled(bank, world, np.concatenate([SUBSETS, SUBSETS[:2]]))
    assert [kept.tolist() for kept in first] == SUBSETS.tolist()
    assert filled(bank, world) == []
    assert bank.losses(SUBSETS).tolist() == [losses_of(kept).tolist() for kept in SUBSETS]


def test_a_bank_that_was_interrupted_goes_on_with_what_is_missing(bank, world, monkeypatch):
    seen = []

    def retrain(kept, on_step):
        if len(seen) == 2:
            monkeypatch.setattr(preemption, "requested", lambda: True)
        return retrain_into(seen)(kept, on_step)

    with pytest.raises(Preempted, match="finished models are stored"):
        fill(bank, SUBSETS, world, retrain, lambda kept: 1, "bank")
    monkeypatch.undo()
    assert [kept.tolist() for kept in filled(bank, world)] == SUBSETS[2:].tolist()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"recipe": {**KEY.recipe, "learning_rate": 1e-3}},
            r"training.learning_rate: 0.0005 there, 0.001 here",
        ),
        ({"recipe": {"epochs": 4}}, r"training.learning_rate: 0.0005 there, None here"),
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"start": "d" * 64}, "initial weights, by fingerprint: 'aaa"),
        ({"data": "d" * 64}, "sequences, by fingerprint: 'bbb"),
        ({"queries": "d" * 64}, "queries, by fingerprint: 'ccc"),
    ],
)
def test_a_bank_of_something_else_is_refused_and_not_changed(bank, world, change, says):
    filled(bank, world)
    before = {path: path.read_bytes() for path in bank.path.rglob("*") if path.is_file()}
    with pytest.raises(StoreError, match=f"made with other settings .*{says}"):
        Bank(bank.path, replace(KEY, **change))
    assert {path: path.read_bytes() for path in bank.path.rglob("*") if path.is_file()} == before


def test_a_damaged_bank_is_named(bank, world):
    filled(bank, world)
    file = next((bank.path / "losses").iterdir())
    content = file.read_bytes()
    file.write_bytes(content[:-3])
    with pytest.raises(StoreError, match=f"{file.name}.*damaged"):
        bank.losses(SUBSETS)
    other = next(path for path in (bank.path / "losses").iterdir() if path != file)
    file.write_bytes(other.read_bytes())
    with pytest.raises(StoreError, match=f"{file.name}.*another subset"):
        bank.losses(SUBSETS)
    manifest = bank.path / "manifest.json"
    manifest.write_text("{")
    with pytest.raises(StoreError, match=r"manifest.*cannot be read"):
        Bank(bank.path, KEY)
    manifest.write_text(json.dumps({"format": "other"}))
    with pytest.raises(StoreError, match="no ekfac_dist-bank/1 bank"):
        Bank(bank.path, KEY)


def test_a_model_that_diverges_ends_the_run_and_what_is_done_stays(bank, world):
    def retrain(kept, on_step):
        if kept.tolist() == SUBSETS[3].tolist():
            raise ConfigError("Training diverges")
        return losses_of(kept), Trained(1, 2.0, 1.0)

    with pytest.raises(ConfigError, match="diverges"):
        fill(bank, SUBSETS, world, retrain, lambda kept: 1, "bank")
    assert [bank.has(kept) for kept in SUBSETS] == [True, True, True, False, False]
