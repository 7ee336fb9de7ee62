"""The benchmark against peers: our side, the comparison and the figures; and, slowly, all of it.

What needs the peers looks for their environments in the directory that PEER_ENVIRONMENTS names, or
in runs/peers.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from model_shapes import Shape
from peer_agreement import errors_of
from peer_batches import (
    Batch,
    as_settings,
    best,
    candidates,
    estimated_seconds,
    given_batch,
    parsed,
    sweep_table,
)
from peer_environments import VERSIONS
from peer_files import load_modules
from peer_results import (
    circumstances,
    markdown,
    median_run,
    plot,
    readme_table,
    shares_of_gemm,
)
from peer_rows import ROWS as KINDS
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

ENVIRONMENTS = Path(os.environ.get("PEER_ENVIRONMENTS", HERE.parents[2] / "runs" / "peers"))
needs_peers = pytest.mark.skipif(
    not all((ENVIRONMENTS / peer / "bin" / "python").exists() for peer in VERSIONS),
    reason=f"no environments of {' and '.join(VERSIONS)} in {ENVIRONMENTS}; fit.py makes them",
)


def made_run(seconds, gigabytes, batch="1,024 tokens a step", **more):
    passes = {"covariance": seconds / 4, "eigenbasis": seconds / 8, "refit": seconds / 4}
    return {
        "whole_seconds": seconds,
        "passes": passes,
        "all_peak_bytes": int(gigabytes * 1e9),
        "batch": batch,
        "versions": {
            "ekfac_dist": "0.9",
            "kronfluence": "1.0.1",
            "bergson": "2.5.1",
            "torch": "2.13.0",
            "transformers": "5.0",
        },
        **more,
    }


RESULTS = {
    "uniform": {
        "ours": [made_run(9.0, 1.2), made_run(4.0, 1.0), made_run(3.0, 1.1)],
        "kronfluence": [made_run(s, 2.0, "4 sequences a batch") for s in (9.0, 8.0, 12.0)],
    },
    "workers": {
        "ours": [made_run(8.0, 1.0)],
        "bergson": [made_run(2.0, 2.0, "256 tokens a batch")],
    },
}
ROWS = {
    "uniform": {
        "work": "64 sequences of 256 tokens",
        "cannot": [],
        "results": RESULTS["uniform"],
        "gemm_flops": {"float32": [150e9, 148.4e9]},
        "started": "2026-11-30T23:50:00+00:00",
    },
    "workers": {
        "work": "64 sequences of 256 tokens, 2 workers",
        "cannot": ["kronfluence"],
        "results": RESULTS["workers"],
        "gemm_flops": {"float32": [151e9, 149e9]},
        "started": "2026-12-01T00:20:00+00:00",
    },
}


def test_our_side_fits_the_saved_model_and_says_what_it_took(tmp_path):
    shape = Shape(64, 96, 1, 64)
    rows = make_rows(6, (8, 16), 64, torch.Generator().manual_seed(0))
    work = tmp_path / "work"
    model = prepare(work, shape, "float32", fit=rows)
    settings = Settings(None, "cpu", threads=1, workers=1, batch=Batch(256))
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


def test_memory_is_that_of_all_processes_of_a_command(tmp_path):
    mib = 2**20
    child = f"import time; kept = bytearray({120 * mib}); time.sleep(1.2)"
    parent = "\n".join(
        [
            "import json, subprocess, sys",
            f"kept = bytearray({80 * mib})",
            f"subprocess.run([sys.executable, '-c', {child!r}], check=True)",
            "print(json.dumps({'peak_bytes': 0}))",
        ]
    )
    settings = Settings(None, "cpu", threads=1, workers=1, batch=Batch(1))
    report = run([sys.executable, "-c", parent], settings, tmp_path / "log")
    assert report["num_processes"] == 2
    for measured in ("all_peak_bytes", "at_once_bytes"):
        assert 200 * mib < report[measured] < 260 * mib


def test_candidates_are_one_four_and_sixteen_of_the_longest_sequence():
    def sizes(side, sequences=64, longest=256, threads=2, device="cpu"):
        return [
            (b.size, b.iterative) for b in candidates(side, sequences, longest, threads, device)
        ]

    assert sizes("bergson") == [(256, False), (1024, False), (4096, False)]
    assert sizes("kronfluence") == [(1, False), (4, False), (16, False), (16, True)]
    assert sizes("kronfluence", sequences=6) == [(1, False), (4, False), (4, True)]
    # What a step may take on a CPU is told as it is, and not tried twice.
    assert sizes("ours") == [(256, False), (1024, False), (2048, False)]
    assert sizes("ours", threads=1) == [(256, False), (1024, False)]
    assert sizes("ours", device="cuda") == [(256, False), (1024, False), (4096, False)]


def test_the_whole_is_estimated_from_a_part_by_layers_and_tokens():
    def fit_seconds(layers, tokens, of_a_token):
        passes = {
            "covariance": layers * tokens * of_a_token,
            "eigenbasis": 3.0 * layers,
            "refit": 2 * layers * tokens * of_a_token,
        }
        return {"whole_seconds": 5.0 + sum(passes.values()), "passes": passes}

    for of_a_token in (0.01, 0.02):
        part, whole = fit_seconds(1, 100, of_a_token), fit_seconds(4, 250, of_a_token)
        estimated = estimated_seconds(part, layers=4, tokens=2.5)
        assert estimated == pytest.approx(whole["whole_seconds"])


def test_the_best_batch_is_that_of_the_least_estimated_seconds():
    tried = [
        {"batch": Batch(size), "estimated_seconds": seconds, "report": made_run(1.0, size)}
        for size, seconds in ((1, 70.0), (4, 64.0), (16, 95.5))
    ]
    assert best(tried) == Batch(4)
    lines = sweep_table({"kronfluence": tried}).splitlines()
    assert [line for line in lines if "best" in line] == [lines[-2]]
    assert "4 sequences a batch" in lines[-2]
    assert "64.0" in lines[-2]


def test_settings_by_hand_are_for_a_row_or_for_all():
    settings = [parsed(text) for text in ("ours=2048", "long:ours=512", "kronfluence=4,iterative")]
    assert given_batch(settings, "long", "ours") == Batch(512)
    assert given_batch(settings, "uniform", "ours") == Batch(2048)
    assert given_batch(settings, "long", "kronfluence") == Batch(4, iterative=True)
    assert given_batch(settings, "long", "bergson") is None
    again = as_settings({"long": {"ours": Batch(512), "kronfluence": Batch(4, iterative=True)}})
    assert again == "long:ours=512 long:kronfluence=4,iterative"
    assert [parsed(text)[2] for text in again.split()] == [Batch(512), Batch(4, iterative=True)]


@pytest.mark.parametrize(
    "text",
    ["ours", "ours=", "ours=0", "ours=-4", "theirs=4", "ours=4,iterative", "kronfluence=4,x"],
)
def test_settings_of_another_form_are_refused(text):
    with pytest.raises(ValueError, match=text):
        parsed(text)


def test_batches_are_told_in_words():
    assert Batch(2048).words("ours") == "2,048 tokens a step"
    assert Batch(256).words("bergson") == "256 tokens a batch"
    assert Batch(1).words("kronfluence") == "1 sequence a batch"
    assert Batch(16, iterative=True).words("kronfluence") == "16 sequences a batch, iterative"


def test_the_table_by_pass_has_median_runs_and_ratios_within_a_round():
    assert median_run(RESULTS["uniform"]["ours"])["whole_seconds"] == 4.0
    lines = [line.strip("| ").split(" | ") for line in markdown(RESULTS).splitlines()]
    assert lines[2][:4] == ["uniform", "ours", "1,024 tokens a step", "4.00"]
    assert lines[2][4:8] == ["1.00", "0.50", "1.00", "1.00"]
    # Rounds are 9/9, 4/8 and 3/12: the median of the ratios, not the ratio of the medians 4 and 9.
    assert lines[3][-3:] == ["0.50", "0.50", "0.55"]
    assert lines[5][:3] == ["workers", "bergson", "256 tokens a batch"]
    assert lines[5][-3:] == ["4.00", "4.00", "0.50"]


def test_the_readmes_table_tells_times_ranges_memory_batches_and_ratios():
    assert readme_table(ROWS).splitlines() == [
        "| work | ekfac_dist | kronfluence 1.0.1 | bergson 2.5.1 |",
        "| --- | --- | --- | --- |",
        "| 64 sequences of 256 tokens "
        "| **4.0 s** (3.0–9.0), 1.00 GB; 1,024 tokens a step "
        "| 9.0 s (8.0–12.0), 2.00 GB; 4 sequences a batch; 2.00 (1.00–4.00) × our time | – |",
        "| 64 sequences of 256 tokens, 2 workers | 8.0 s, 1.00 GB; 1,024 tokens a step | cannot "
        "| **2.0 s**, 2.00 GB; 256 tokens a batch; 0.25 × our time |",
    ]


def test_over_the_table_stand_machine_days_rates_and_versions():
    machine = {"processor": "A processor", "device": None, "threads": 2}
    said = circumstances(machine, ROWS)
    assert said.startswith("A processor, 2 threads, 30 November 2026, 1 December 2026.")
    for words in ("148–151 GFLOP/s in float32", "1 or 3 rounds", "ekfac_dist 0.9"):
        assert words in said
    assert "bergson 2.5.1 with torch 2.13.0" in said


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
    for word in (
        "uniform",
        "workers",
        "ekfac_dist",
        "kronfluence",
        "bergson",
        "4.0 s, 1.0 GB; 1,024",
    ):
        assert word in words


@pytest.mark.slow
@needs_peers
def test_all_three_sides_agree(tmp_path):
    results = tmp_path / "results.json"
    command = [sys.executable, HERE / "fit.py", "--environments", ENVIRONMENTS, "--small"]
    command += ["--rows", "ragged", "workers", "--repeats", "2", "--threads", "1"]
    command += ["--settings", "ours=128", "workers:bergson=64"]
    command += ["--json", results, "--plot", tmp_path / "peers.svg"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())
    rows = found["rows"]
    assert set(rows["ragged"]["results"]) == {"ours", "kronfluence", "bergson"}
    assert set(rows["workers"]["results"]) == {"ours", "bergson"}
    for errors in (side for row in rows.values() for side in row["agreement"].values()):
        assert max(of_E for of_E, _ in errors.values()) < 1e-4
    for side, version in VERSIONS.items():
        runs = rows["ragged"]["results"][side]
        assert [run["versions"][side] for run in runs] == 2 * [version]

    # What was not given was swept, and the best of it is what ran.
    assert set(rows["ragged"]["sweep"]) == {"kronfluence", "bergson"}
    assert rows["workers"]["sweep"] == {}
    for side, tried in rows["ragged"]["sweep"].items():
        chosen = min(tried, key=lambda one: one["estimated_seconds"])
        words = Batch(**chosen["batch"]).words(side)
        assert {run["batch"] for run in rows["ragged"]["results"][side]} == {words}
        assert words in found["table"]
    assert found["table"] in done.stdout
    assert found["circumstances"] in done.stdout


@pytest.mark.slow
@needs_peers
def test_every_candidate_of_a_peer_fits_the_same_factors(tmp_path):
    row = KINDS["ragged"].small()
    work = tmp_path / "work"
    prepare(work, row.shape, "float32", fit=row.data())
    ours = Settings(ENVIRONMENTS, "cpu", threads=1, workers=1, batch=Batch(128))
    run(fit_command("ours", work, ours), ours, work / "ours.log")
    for side in ("kronfluence", "bergson"):
        for batch in candidates(side, row.sequences, row.lengths[1], 1, "cpu"):
            shutil.rmtree(work / side, ignore_errors=True)
            settings = replace(ours, batch=batch)
            run(fit_command(side, work, settings), settings, work / f"{side}.log")
            errors = errors_of(
                load_modules(work), read_factors(side, work), read_factors("ours", work)
            )
            assert max(of_E for of_E, _ in errors.values()) < 1e-4, (side, batch)


@pytest.mark.slow
@needs_peers
def test_scores_agree_with_kronfluence_and_with_autograd():
    command = [sys.executable, HERE / "scores.py", "--environments", ENVIRONMENTS, "--small"]
    command += ["--check", "--dtype", "float64", "--data", "ragged", "--threads", "1"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    exact = [line for line in done.stdout.splitlines() if ", exact" in line and "1.000000" in line]
    assert len(exact) == 3  # ours, and kronfluence in either order
