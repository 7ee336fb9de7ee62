"""The command line, on real workers: files on disk against dense autograd, and what people see."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.dense import dense_modules, relative
from helpers.refusals import in_this_process
from helpers.workshop import (
    run_cli,
    run_here,
    save_tiny_gpt2,
    save_tiny_llama,
    texts,
    write_jsonl,
    write_yaml,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ekfac_dist.factors.layout import CHECKSUM, MANIFEST, manifest_checksum
from ekfac_dist.runtime.terminal import visible


def fit(directory, workers, prompt=False):
    """Runs `estimate` on a text whose rows are `directory`'s own; returns the finished process."""
    rows = [
        {"text": text, "asked": text[: 3 * (k % 4)], "said": text[3 * (k % 4) :]}
        for k, text in enumerate(texts(11, words=(1, 12)))
    ]
    data = write_jsonl(directory / "text.jsonl", rows)
    columns = {"text": "said", "prompt": "asked"} if prompt else {"text": "text"}
    config = write_yaml(
        directory / "run.yaml",
        {
            "model": {"name": directory / "model", "dtype": "float64"},
            "data": {"source": data, "max_tokens": 20, **columns},
            "factors": {"labels": "data", "accumulate": "float64"},
            "batch_tokens": 64,
            "output": directory / "store",
        },
    )
    done = run_cli(["estimate", "--config", config], workers)
    assert done.returncode == 0, done.stderr
    return rows, done


@pytest.mark.parametrize(
    ("save", "prompt", "settings"),
    [
        (save_tiny_llama, False, {"mlp_bias": True}),
        pytest.param(save_tiny_gpt2, True, {}, marks=pytest.mark.slow),
    ],
)
def test_the_files_of_two_workers_hold_what_dense_autograd_says(tmp_path, save, prompt, settings):
    save(tmp_path / "model", dtype=torch.float64, **settings)
    rows, _ = fit(tmp_path, 2, prompt)
    store = tmp_path / "store"
    manifest = json.loads((store / "manifest.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    sequences = []
    for row in rows:
        asked = row["asked"] if prompt else ""
        text = row["asked"] + row["said"]
        encoded = tokenizer(text, return_offsets_mapping=True)
        ids = torch.tensor(encoded["input_ids"])[:20]
        begins = torch.tensor([start for start, _ in encoded["offset_mapping"]])[:20]
        # BOS, the first token, is nobody's label.
        labelled = (begins >= len(asked)) & (torch.arange(len(ids)) > 0)
        if not labelled.any():
            continue
        last = int(labelled.nonzero().max())
        targets = torch.where(labelled, ids, -100)[1 : last + 1]
        sequences.append((ids[:last], targets))
    assert manifest["complete"] is True
    assert manifest["format"] == "ekfac_dist/1"
    assert manifest["data"]["num_sequences"] == len(sequences)
    assert manifest["data"]["num_positions"] == sum(len(ids) for ids, _ in sequences)
    assert manifest["passes"]["refit"]["workers"] == 2
    oracle = dense_modules(model, sequences, list(manifest["modules"]))
    for name, entry in manifest["modules"].items():
        dense = oracle[name]
        covariances, bases = {}, {}
        for side, expected in (("input", dense.A), ("output", dense.S)):
            covariances[side] = load_file(store / "covariance" / f"{entry[side]}.safetensors")[
                "sum"
            ]
            assert relative(covariances[side] / dense.M, expected) < 1e-10
            basis = load_file(store / "eigenbasis" / f"{entry[side]}.safetensors")
            bases[side] = basis["eigenvectors"]
            rebuilt = bases[side] @ torch.diag(basis["eigenvalues"]) @ bases[side].T
            assert relative(rebuilt, expected) < 1e-10
            assert (basis["eigenvalues"].diff() >= 0).all()
        lam = load_file(store / "spectrum" / f"{name}.safetensors")["lambda"]
        Q = torch.kron(bases["output"], bases["input"])
        assert relative(lam.flatten(), torch.diag(Q.T @ dense.F @ Q)) < 1e-10
        assert relative(Q @ torch.diag(lam.flatten()) @ Q.T, dense.E()) < 1e-8
    files = {str(p.relative_to(store)) for p in store.rglob("*.safetensors")}
    assert files == set(manifest["files"])


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fitted")
    save_tiny_llama(directory / "model")
    _, done = fit(directory, 2)
    return directory, done


def test_estimate_says_who_works_what_is_covered_and_what_it_took(fitted):
    _, done = fitted
    for words in (
        "workers       2, backend gloo",
        "2 × cpu, 1 thread",
        "11 of 11 sequences",
        "LlamaForCausalLM",
        "100.0% of the MLP's",
        "peak memory",
        "tokens/s",
        "factors of half of the sequences are off: A up to",
    ):
        assert words in done.stdout
    for stage in ("covariance", "eigenbasis", "refit"):
        assert sum(line.startswith(stage) for line in done.stdout.splitlines()) == 1
        # One worker alone shows progress, in whole lines.
        assert (
            sum(line.startswith(stage) and "100%" in line for line in done.stderr.splitlines()) == 1
        )
    assert "\r" not in done.stderr


def test_inspect_shows_every_module_and_verifies_every_file(fitted):
    directory, _ = fitted
    picture = directory / "spectra.png"
    done = run_here(["inspect", directory / "store", "--verify", "--plot", picture])
    assert done.returncode == 0, done.stderr
    assert "all as they were written" in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("model.layers.")]
    assert sum(".mlp." in row for row in rows) == len(rows) == 6
    assert "½ scores" in done.stdout
    assert done.stdout.count("shared") == 2
    assert "empirical Fisher" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


ACTING = "\x1b]0;mine\x07\x1b[31m\u202eevil\x9b\r\nekfac-dist: error: below"


@pytest.mark.parametrize(
    ("rows", "name", "says"),
    [
        ([{ACTING: "a"}], "text.jsonl", "has no column 'text'; its columns are ␛]0;mine␇␛[31m"),
        ([{"text": [ACTING]}], "text.jsonl", "must hold text"),
        ([{"other": "a"}], f"{ACTING}.jsonl", "␛]0;mine␇␛[31mU+202EevilU+009B␍↵ekfac-dist: err"),
    ],
)
def test_names_and_values_in_a_refusal_do_not_act(fitted, tmp_path, capfd, rows, name, says):
    directory, _ = fitted
    data = write_jsonl(tmp_path / name, rows)
    arguments = ["estimate", "--model.name", directory / "model", "--data.source", data]
    arguments += ["--output", tmp_path / "store"]
    status, _, stderr = in_this_process(list(map(str, arguments)), capfd)
    assert status == 2
    (line,) = stderr.removesuffix("\n").split("\n")
    assert line == visible(line)
    assert says in line


def test_names_in_a_stores_manifest_do_not_act(fitted, tmp_path, capfd):
    directory, _ = fitted
    shutil.copytree(directory / "store", tmp_path / "store")
    manifest = json.loads((tmp_path / "store" / MANIFEST).read_text())
    manifest["data"]["source"] = manifest["model"]["name"] = ACTING
    manifest["coverage"]["skipped"] = {ACTING: ACTING}
    manifest["files"][f"spectrum/{ACTING}"] = {"bytes": 1, "sha256": "0" * 64}
    manifest[CHECKSUM] = manifest_checksum(manifest)
    (tmp_path / "store" / MANIFEST).write_text(json.dumps(manifest))
    for options, wanted in ((["--verify"], 2), ([], 0)):
        store = str(tmp_path / "store")
        status, stdout, stderr = in_this_process(["inspect", store, *options], capfd)
        assert status == wanted
        for line in [*stdout.split("\n"), *stderr.split("\n")]:
            assert line == visible(line)
            assert not line.startswith("ekfac-dist: error: below")
        assert "␛]0;mine␇␛[31mU+202Eevil" in stdout


def test_a_defects_traceback_does_not_act(fitted, capfd, monkeypatch):
    def fail(path):
        raise RuntimeError(ACTING)

    monkeypatch.setattr("ekfac_dist.report.inspection.inspect_store", fail)
    directory, _ = fitted
    status, _, stderr = in_this_process(["inspect", str(directory / "store")], capfd)
    assert status == 1
    assert stderr.startswith("Traceback")
    assert "RuntimeError: ␛]0;mine␇␛[31mU+202EevilU+009B␍\n" in stderr


def test_a_flipped_bit_is_found(fitted, tmp_path):
    directory, _ = fitted
    shutil.copytree(directory / "store", tmp_path / "store")
    victim = sorted((tmp_path / "store" / "spectrum").iterdir())[0]
    content = bytearray(victim.read_bytes())
    content[-3] ^= 4
    victim.write_bytes(content)
    done = run_here(["inspect", tmp_path / "store", "--verify"])
    assert done.returncode == 2
    assert f"BAD  spectrum/{victim.name}" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [[], ["estimate"], ["inspect"], ["demo"], ["serve"]])
def test_help_is_short_and_quick(command):
    done = run_cli([*command, "--help"])
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) < 100
    # It is quick because nothing heavy is imported for it.
    code = (
        "import sys\n"
        "from ekfac_dist.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit:\n    pass\n"
        "print('torch' in sys.modules)"
    )
    probe = [sys.executable, "-c", code, *command, "--help"]
    asked = subprocess.run(probe, capture_output=True, text=True, check=True)
    assert asked.stdout.splitlines()[-1] == "False"


def test_the_fitted_store_loads_for_its_model_and_no_other(fitted, tmp_path):
    from ekfac_dist import load_factors
    from ekfac_dist.errors import StoreError

    directory, _ = fitted
    model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float64)
    factors = load_factors(directory / "store", model=model)
    name, module = next(iter(factors.modules.items()))
    gradient = torch.randn(module.num_outputs, module.input_size)
    assert factors.solve({name: gradient})[name].shape == gradient.shape
    other = save_tiny_llama(tmp_path / "other", seed=1)
    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float64)
    with pytest.raises(StoreError, match="weights differ"):
        load_factors(directory / "store", model=model)


def test_a_dry_run_lists_every_module_and_writes_nothing(tmp_path):
    model = save_tiny_llama(tmp_path / "model", mlp_bias=True)
    done = run_here(
        [
            *("estimate", "--model.name", model, "--data.source", tmp_path / "none.jsonl"),
            *("--output", tmp_path / "store", "--model.modules", '["*_proj"]', "--dry-run"),
        ]
    )
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if "_proj" in line}
    gate, up = (lines[f"model.layers.1.mlp.{name}_proj"] for name in ("gate", "up"))
    assert "24 × 16 + 1" in gate
    assert "shared" not in gate
    assert up.endswith("input shared with model.layers.1.mlp.gate_proj")
    assert "of the MLP's" in done.stdout
    assert not (tmp_path / "store").exists()
    narrow = run_here(
        [
            *("estimate", "--model.name", model, "--data.source", "none.jsonl", "--dry-run"),
            *("--output", tmp_path / "store", "--model.modules", '["*.0.mlp.*"]'),
        ]
    )
    left_out = "not tracked   model.layers.1.mlp.up_proj.weight: not chosen by model.modules"
    assert left_out in narrow.stdout
