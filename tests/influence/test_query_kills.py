"""Real queries that are killed or preempted: they go on, on as many workers as there are then.

The more there are, the more of them share the gradients of all rows, and the more fit together.
"""

import json
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from helpers.dense import relative
from helpers.long_runs import family, running, wait_for, worker
from helpers.workshop import run_cli, save_tiny_llama, texts, write_jsonl
from safetensors.torch import load_file

from ekfac_dist.influence.results import MANIFEST
from ekfac_dist.influence.scores import Details

pytestmark = pytest.mark.slow
NUMBER = 10
PIECES = {"scan": "state/scan-4-5.safetensors", "details": "state/details-6-7.safetensors"}


def arguments(root: Path, output: Path) -> list[str | Path]:
    """A query whose blocks have as many rows as there are workers."""
    return [
        *("query", "--factors", root / "store", "--queries", root / "queries.jsonl"),
        *("--scores.query_memory_gb", "1e-5", "--scores.normalize", "relatif_l"),
        *("--scores.top_k", "5", "--batch_tokens", "40", "--output", output),
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Factors, queries, and what an uninterrupted run answers."""
    root = tmp_path_factory.mktemp("query kills")
    save_tiny_llama(root / "model", dtype=torch.float64)
    write_jsonl(root / "text.jsonl", [{"text": text} for text in texts(60)])
    write_jsonl(root / "queries.jsonl", [{"text": text} for text in texts(NUMBER, seed=3)])
    fit = ["estimate", "--model.name", root / "model", "--data.source", root / "text.jsonl"]
    done = run_cli([*fit, "--output", root / "store"], timeout=180)
    assert done.returncode == 0, done.stderr
    done = run_cli(arguments(root, root / "whole"), workers=2, timeout=180)
    assert done.returncode == 0, done.stderr
    return root


def content(results: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(results)): p.read_bytes() for p in results.rglob("*") if p.is_file()}
    manifest = json.loads(found.pop(MANIFEST))
    del manifest["seconds"], manifest["config"]["output"]
    return found | {MANIFEST: json.dumps(manifest).encode()}


def goes_on_to_the_end(root: Path, output: Path, workers: int) -> None:
    done = run_cli(arguments(root, output), workers=workers, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "goes on" in done.stdout
    assert "shard         " + str(workers) in done.stdout or workers == 1
    assert re.findall(r"scan 1/\d", done.stderr) == []
    # Three blocks of two rows are saved, perhaps the fourth too; a block then has a row a worker.
    last = re.findall(r"scan (\d+)/\d+", done.stderr)[-1]
    assert int(last) in {1: (6, 7), 2: (5,), 3: (5,)}[workers]
    if workers == 2:
        assert content(output) == content(root / "whole")
        return
    assert {p.name for p in output.iterdir()} == {p.name for p in (root / "whole").iterdir()}
    for read in (lambda results: load_file(results / "scores.safetensors"), details):
        found, wanted = read(output), read(root / "whole")
        assert found.keys() == wanted.keys()
        for name, values in found.items():
            assert relative(values.double(), wanted[name].double()) < 1e-6, name


def details(results: Path) -> dict[str, torch.Tensor]:
    """Those of each pair, by query and sequence: they are stored block by block."""
    stored = load_file(results / "details.safetensors")
    rows, columns = stored["pair_query"].numpy(), stored["pair_index"].numpy()
    offsets, layers = stored["offsets"].numpy(), stored["layer_token_scores"]
    found = Details(rows, columns, offsets, layers, stored["module_scores"])
    ordered = found.take(np.lexsort((columns, rows)))
    return {name: torch.as_tensor(value) for name, value in vars(ordered).items()}


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("victim", ["0", "all"])
def test_a_query_killed_with_kill_9_goes_on(root: Path, tmp_path: Path, victim: str, workers: int):
    output = tmp_path / "scores"
    with running(root, output, given=arguments(root, output)) as process:
        assert wait_for((output / PIECES["scan"]).exists, process, 180)
        kill(process, victim)
        process.communicate(timeout=120)
    assert process.returncode != 0
    assert not json.loads((output / MANIFEST).read_text())["complete"]
    goes_on_to_the_end(root, output, workers)


def kill(process: subprocess.Popen[str], victim: str) -> None:
    """Each with SIGKILL."""
    found = family(process) if victim == "all" else [worker(process, int(victim))]
    for member in found:
        assert member is not None
        with suppress(psutil.NoSuchProcess):
            member.kill()


@pytest.mark.parametrize("target", ["the launcher", "1"])
def test_a_preempted_query_keeps_finished_blocks_and_goes_on(
    root: Path, tmp_path: Path, target: str
):
    output = tmp_path / "scores"
    with running(root, output, given=arguments(root, output)) as process:
        assert wait_for((output / PIECES["details"]).exists, process, 180)
        if target == "the launcher":
            process.send_signal(signal.SIGTERM)
        else:
            found = worker(process, int(target))
            assert found is not None
            found.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 143, stderr
    assert "Traceback" not in stderr
    assert "SIGTERM; blocks of queries that are finished are stored" in stderr
    goes_on_to_the_end(root, output, 2)
