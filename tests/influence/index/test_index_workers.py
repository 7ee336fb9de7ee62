"""An index that several workers make, read and are killed at."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers.dense import relative
from helpers.long_runs import family, running
from helpers.made_indices import adding, arguments, content, make_store
from helpers.workshop import run_cli
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = make_store(tmp_path_factory.mktemp("index of workers"))
    for output, command in (("whole", arguments), ("grown", arguments), ("grown", adding)):
        done = run_cli(command(root, root / output), workers=2, timeout=180)
        assert done.returncode == 0, done.stderr
    return root


def gradients(index: Path) -> dict[str, torch.Tensor]:
    """What an index keeps, multiplied out: signs of u and v are free."""
    found = {}
    for file in sorted(index.glob("shard-*")):
        tensors = load_file(file)
        for name, left in tensors.items():
            if name.endswith(".u"):
                right = tensors[name.removesuffix("u") + "v"]
                found[f"{file.name} {name}"] = left.float().mT @ right.float()
        found |= {f"{file.name} {name}": tensors[name].double() for name in ("indices", "norms")}
    return found


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_makes_the_same_index(root, tmp_path, workers):
    done = run_cli(arguments(root, tmp_path / "index"), workers=workers, timeout=180)
    assert done.returncode == 0, done.stderr
    found, wanted = gradients(tmp_path / "index"), gradients(root / "whole")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():  # bfloat16 rounds to 1/256
        assert (found[name] - tensor).norm() <= 0.01 * tensor.norm(), name
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert manifest["workers"] == workers


@pytest.mark.parametrize(("workers", "shard"), [(2, 1), (2, 2), (3, 1)])
def test_any_number_of_workers_scores_alike(root, tmp_path, workers, shard):
    found = []
    for number, share in ((1, 1), (workers, shard)):
        output = tmp_path / f"scores-{number}"
        command = [
            *("query", "--factors", root / "store", "--index", root / "whole"),
            *("--queries", root / "queries.jsonl", "--output", output),
            *("--scores.normalize", "cosine", "--scores.rescore", "6", "--scores.top_k", "4"),
            *("--scores.shard", str(share)),
        ]
        done = run_cli(command, workers=number, timeout=180)
        assert done.returncode == 0, done.stderr
        found.append(load_file(output / "scores.safetensors"))
    for name in ("scores", "norms", "exact_scores"):
        assert relative(found[0][name], found[1][name]) < 1e-4, name


@pytest.mark.parametrize("command", [arguments, adding])
def test_killed_at_any_moment_it_goes_on(root, tmp_path, command):
    draw, index = random.Random(0), tmp_path / "index"
    adds = command is adding
    for attempt in range(6):
        if adds:
            shutil.copytree(root / "whole", index)
        with running(root, index, 2, given=command(root, index)) as process:
            time.sleep(4 + draw.random() * 6)
            for one in family(process):
                one.send_signal(signal.SIGKILL)
        done = run_cli(command(root, index), workers=2, timeout=180)
        if done.returncode:  # it was finished before
            assert "holds a finished index" in done.stderr, done.stderr
        assert content(index) == content(root / ("grown" if adds else "whole")), attempt
        shutil.rmtree(index)
