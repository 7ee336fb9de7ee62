"""What commands import: no more than they need, and without the garbage collector."""

import json
import subprocess
import sys

import pytest
from helpers.workshop import run_here, save_tiny_llama, texts, write_jsonl, write_yaml

# Runs commands in one process; then prints what is imported, and how the collector is left.
SCRIPT = """
import gc, json, sys
from ekfac_dist.cli import main
statuses = []
for command in json.loads(sys.argv[1]):
    try:
        statuses.append(main(command))
    except SystemExit as end:  # after help
        statuses.append(end.code)
collector = {"enabled": gc.isenabled(), "left_out": gc.get_freeze_count()}
print(json.dumps({"statuses": statuses, "modules": sorted(sys.modules), **collector}))
"""


def after(*commands):
    """What a new process has imported after commands, and how many objects it does not collect."""
    words = json.dumps([list(map(str, command)) for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, words], capture_output=True, text=True, check=True
    )
    state = json.loads(done.stdout.splitlines()[-1])
    return state, {name.partition(".")[0] for name in state["modules"]}


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A directory with the configuration of a fit, its store, and scores by it."""
    directory = tmp_path_factory.mktemp("answered")
    write_jsonl(directory / "queries.jsonl", [{"prompt": "small", "completion": " large"}])
    data = write_jsonl(directory / "text.jsonl", [{"text": text} for text in texts(6)])
    write_yaml(
        directory / "estimate.yaml",
        {
            "model": {"name": save_tiny_llama(directory / "model")},
            "data": {"source": data, "max_tokens": 16},
        },
    )
    for command in fit(directory, "store"), query(directory, "scores"):
        done = run_here(command)
        assert done.returncode == 0, done.stderr
    return directory


def fit(directory, output):
    config = directory / "estimate.yaml"
    return ["estimate", "--config", config, "--output", directory / output]


def query(directory, output):
    queries = ["--queries", directory / "queries.jsonl"]
    return ["query", "--factors", directory / "store", *queries, "--output", directory / output]


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("--help", 0),
        ("--version", 0),
        ("estimate --help", 0),
        ("query --help", 0),
        ("inspect --help", 0),
        ("estimat", 2),
        ("estimate --batch_tokens many", 2),
    ],
)
def test_help_and_mistakes_are_answered_without_torch(command, status):
    state, packages = after(command.split())
    assert state["statuses"] == [status]
    assert not {"torch", "numpy", "transformers", "datasets", "accelerate"} & packages


def test_a_fit_and_a_query_import_no_package_that_only_others_need(answered):
    state, packages = after(fit(answered, "again"), query(answered, "scores again"))
    assert state["statuses"] == [0, 0]
    assert {"torch", "transformers", "datasets"} <= packages
    others = {"matplotlib", "sklearn", "peft", "bitsandbytes", "gguf", "bm25s", "fastapi"}
    others |= {"uvicorn", "prometheus_client", "playwright", "pytest"}
    assert not others & packages


def test_stores_and_results_are_looked_at_without_models_and_data(answered):
    page = answered / "page.html"
    state, packages = after(
        ["inspect", answered / "store", "--verify"],
        ["report", answered / "scores", "--output", page],
    )
    assert state["statuses"] == [0, 0]
    assert "torch" in packages
    assert not {"transformers", "accelerate", "datasets", "pandas", "sympy"} & packages
    assert not {"torch.distributed.fsdp", "torch._dynamo"} & set(state["modules"])


def test_what_is_imported_is_left_out_of_collections_which_go_on_after_it(answered):
    state, _ = after(["inspect", answered / "store"])
    assert state["enabled"]
    assert state["left_out"] > 100_000
