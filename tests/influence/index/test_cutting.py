"""How an index is cut into shards: whoever makes it alike, and no finer than steps."""

import json

import numpy as np
import pytest
import torch
from helpers.made_indices import NUMBER, STEP, arguments, make_store
from helpers.workshop import run_here
from safetensors.torch import load_file

from ekfac_dist.influence.index import making
from ekfac_dist.influence.index.layout import plan_shards

EACH = 10**5  # bytes, of which a shard holds at most 512 · 10⁶


@pytest.mark.parametrize(
    ("num_sequences", "length", "num_shards"),
    [
        (1, 5, 1),
        (20, 10, 1),  # not one step
        (64, 64, 1),  # one step
        (127, 64, 1),
        (128, 64, 2),
        (500, 64, 4),  # 7 steps
        (1024, 64, 16),
        (1279, 64, 16),
        (81_920, 64, 16),
        (81_921, 64, 17),  # more than 16 of the largest size
        (5, 4096, 4),
        (5, 10**6, 5),  # no more than there are sequences
    ],
)
def test_there_are_sixteen_shards_or_more_if_there_is_a_step_for_each(
    num_sequences, length, num_shards
):
    shards = plan_shards(np.full(num_sequences, length), 0, 0, EACH, 4096)
    assert len(shards) == num_shards
    assert [place for shard in shards for place in shard.places] == list(range(num_sequences))
    sizes = [shard.length for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    if num_shards > 1 and length < 4096:
        assert min(sizes) * length >= 4096 - length


def test_shards_of_what_is_added_are_cut_by_what_is_added():
    num_positions = np.array([10**6] * 50 + [64] * 128)
    shards = plan_shards(num_positions, 50, 16, EACH, 4096)
    assert [(shard.number, shard.first, shard.length) for shard in shards] == [
        (16, 50, 64),
        (17, 114, 64),
    ]
    assert plan_shards(num_positions, len(num_positions), 16, EACH, 4096) == []


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("shards"))


def products(index):
    """Gradients that an index keeps, and their norms, by the sequence."""
    manifest, found = json.loads((index / "manifest.json").read_text()), {}
    for entry in manifest["shards"]:
        tensors = load_file(index / entry["file"])
        for name in [name for name in tensors if name.endswith(".u")]:
            right = tensors[name.removesuffix("u") + "v"]
            found.setdefault(name, []).append(tensors[name].mT @ right)
        found.setdefault("norms", []).append(tensors["norms"])
    return len(manifest["shards"]), {name: torch.cat(parts) for name, parts in found.items()}


def test_a_few_sequences_are_one_shard_of_full_steps_with_the_same_gradients(
    root, tmp_path, monkeypatch
):
    steps, run_pass = [], making.run_pass

    def counted(*given, state, **rest):
        steps.append(len(state.batches))
        return run_pass(*given, state=state, **rest)

    monkeypatch.setattr(making, "run_pass", counted)
    kept = ("--index.rank", "64", "--index.dtype", "float32")
    for name, size in (("fine", STEP), ("whole", ("--batch_tokens", "4096"))):
        done = run_here(arguments(root, tmp_path / name, *kept, *size))
        assert done.returncode == 0, done.stderr
    (num_fine, fine), (num_whole, whole) = products(tmp_path / "fine"), products(tmp_path / "whole")
    assert (num_fine, num_whole) == (16, 1)
    assert steps[0] == NUMBER  # every sequence is longer than such a step
    assert steps[1] <= 2
    assert len(whole["norms"]) == NUMBER
    for name, tensor in whole.items():
        assert (fine[name] - tensor).norm() <= 1e-4 * tensor.norm(), name
