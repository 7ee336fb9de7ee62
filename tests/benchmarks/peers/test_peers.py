"""The benchmark against peers: our side, the comparison and the figures; and, slowly, all of it.

What needs the peers looks for their environments in the directory that PEER_ENVIRONMENTS names, or
in runs/peers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from peer_agreement import errors_of
from peer_environments import VERSIONS
from peer_files import load_modules
from peer_results import markdown, median_run, plot, shares_of_gemm
from peer_sides import (
    HERE,
    Settings,
    fit_command,
    make_rows,
    prepare,
    read_factors,
    require_same_modules,
    run,
)

sys.path.append(str(HERE.parent))
from model_shapes import Shape

ENVIRONMENTS = Path(os.environ.get("PEER_ENVIRONMENTS", HERE.parents[2] / "runs" / "peers"))
needs_peers = pytest.mark.skipif(
    not all((ENVIRONMENTS / peer / "bin" / "python").exists() for peer in VERSIONS),
    reason=f"no environments of {' and '.join(VERSIONS)} in {ENVIRONMENTS}; fit.py makes them",
)


def made_run(seconds, gigabytes, **more):
    passes = {"covariance": seconds / 4, "eigenbasis": seconds / 8, "refit": seconds / 4}
    return {
        "whole_seconds": seconds,
        "passes": passes,
        "all_peak_bytes": int(gigabytes * 1e9),
        **more,
    }


RESULTS = {
    "uniform": {
        "ours": [made_run(9.0, 1.2), made_run(4.0, 1.0), made_run(3.0, 1.1)],
        "kronfluence": [made_run(8.0, 2.0)],
    },
    "workers": {"ours": [made_run(2.0, 1.0)], "bergson": [made_run(8.0, 2.0)]},
}


def test_our_side_fits_the_saved_model_and_says_what_it_took(tmp_path):
    shape = Shape(64, 96, 1, 64)
    rows = make_rows(6, (8, 16), 64, torch.Generator().manual_seed(0))
    work = tmp_path / "work"
    model = prepare(work, shape, "float32", fit=rows)
    settings = Settings(None, "cpu", threads=1, workers=1, batch_tokens=256, batch=4)
    report = run(fit_command("ours", work, settings), settings, work / "ours.log")
    assert list(report["passes"]) == ["covariance", "eigenbasis", "refit"]
    assert sum(report["passes"].values()) < report["whole_seconds"]
    assert report["all_peak_bytes"] >= report["peak_bytes"] > 2**20
    assert report["versions"]["torch"] == torch.__version__

    require_same_modules(["ours"], work)
    name = load_modules(work)[-1]
    basis_OO, basis_II, lambda_OI = read_factors("ours", work)(name)
    assert lambda_OI.shape == model.get_submodule(name).weight.shape == (64, 96)
    assert basis_OO.shape == (64, 64)
    assert basis_II.shape == (96, 96)


def test_errors_are_those_of_the_whole_approximation():
    generator = torch.Generator().manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(n, n, generator=generator).double())[0] for n in (5, 3)]
    spectrum = torch.rand(5, 3, generator=generator).double()
    turned = (-bases[0], bases[1].flip(1), spectrum.flip(1))
    given = {"same": (*bases, spectrum), "twice": (*bases, 2 * spectrum), "turned": turned}
    errors = errors_of(given, given.__getitem__, lambda name: given["same"])
    assert errors["same"] == pytest.approx((0, 0), abs=1e-7)
    assert errors["turned"] == pytest.approx((0, 0), abs=1e-7)
    assert errors["twice"] == pytest.approx((1, 1))


def test_the_table_has_median_runs_and_our_share_of_them():
    assert median_run(RESULTS["uniform"]["ours"])["whole_seconds"] == 4.0
    lines = [line.strip("| ").split(" | ") for line in markdown(RESULTS).splitlines()]
    assert lines[2][:7] == ["uniform", "ours", "4.00", "1.00", "0.50", "1.00", "1.00"]
    assert lines[3][-3:] == ["0.50", "0.50", "0.50"]
    assert lines[5][:2] + lines[5][-3:] == ["workers", "bergson", "0.25", "0.25", "0.50"]


def test_memory_is_the_gpus_where_there_is_one():
    on_gpu = {
        "qwen": {
            "ours": [made_run(1.0, 5.0, device_peak_bytes=10**9)],
            "kronfluence": [made_run(2.0, 5.0, device_peak_bytes=4 * 10**9)],
        }
    }
    assert markdown(on_gpu).splitlines()[-1].endswith("| 4.00 | 0.50 | 0.50 | 0.25 |")


def test_shares_of_the_gemm_rate_are_of_each_pass():
    least = {name: {"covariance": 0.5, "refit": 0.25} for name in RESULTS}
    assert shares_of_gemm(RESULTS, least).splitlines()[2] == "| uniform | ours | 50% | 25% |"


def test_the_plot_names_every_row_and_side(tmp_path):
    path = tmp_path / "made" / "peers.svg"
    plot(RESULTS, path, "a title")
    words = "".join(ElementTree.parse(path).getroot().itertext())
    for word in ("uniform", "workers", "ekfac_dist", "kronfluence", "bergson", "4.0 s, 1.0 GB"):
        assert word in words


@pytest.mark.slow
@needs_peers
def test_all_three_sides_agree(tmp_path):
    results = tmp_path / "results.json"
    command = [sys.executable, HERE / "fit.py", "--environments", ENVIRONMENTS, "--small"]
    command += ["--rows", "ragged", "workers", "--repeats", "1", "--threads", "1"]
    command += ["--json", results]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())
    assert set(found["results"]["ragged"]) == {"ours", "kronfluence", "bergson"}
    assert set(found["results"]["workers"]) == {"ours", "bergson"}
    for errors in (side for row in found["agreement"].values() for side in row.values()):
        assert max(of_E for of_E, _ in errors.values()) < 1e-4
    for side, version in VERSIONS.items():
        runs = found["results"]["ragged"][side]
        assert [run["versions"][side] for run in runs] == [version]


@pytest.mark.slow
@needs_peers
def test_scores_agree_with_kronfluence_and_with_autograd():
    command = [sys.executable, HERE / "scores.py", "--environments", ENVIRONMENTS, "--small"]
    command += ["--check", "--dtype", "float64", "--data", "ragged", "--threads", "1"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    exact = [line for line in done.stdout.splitlines() if ", exact" in line and "1.000000" in line]
    assert len(exact) == 3  # ours, and kronfluence in either order
