import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from helpers.demo_results import write_scores, write_store

from ekfac_dist.demo import commands, configs, run, steps
from ekfac_dist.demo.answers import QUERIES, answers_with_modules
from ekfac_dist.demo.directory import DemoPaths, DemoSettings, remove_paths
from ekfac_dist.demo.model import ModelShape
from ekfac_dist.demo.run import run_demo
from ekfac_dist.errors import ConfigError, OutputError

ROWS = [
    {
        "text": f"def function_{n}(value):\n    return value + {n}\n",
        "module": f"m{n}",
        "kind": "source",
    }
    for n in range(400)
]
SETTINGS = DemoSettings(
    vocab_size=300,
    shape=ModelShape(hidden=16, mlp=24, layers=1, heads=2, context=32),
    training_seconds=None,
    max_steps=2,
    max_sequences=20,
    max_tokens=32,
)
FROM_FACTORS_ON = ["estimate", "inspect", "query", "report"]


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Stands in for the standard library and for the commands; lists what was called."""
    called = []

    def write_corpus(path):
        called.append("corpus")
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        return len(ROWS)

    def train_model(*arguments, **keywords):
        called.append("model")
        return original_train_model(*arguments, **keywords, show_progress=False)

    def call(step, command):
        called.append(step)
        if step in ("estimate", "query"):
            config = yaml.safe_load(Path(command[-1]).read_text())
            (write_store if step == "estimate" else write_scores)(config)
        if step == "report":
            Path(command[-1]).write_text("a page")
        return 0

    original_train_model = run.train_model
    monkeypatch.setattr(run, "write_corpus", write_corpus)
    monkeypatch.setattr(run, "train_model", train_model)
    monkeypatch.setattr(steps, "call", call)
    return called


def test_all_steps_are_taken_once_and_a_second_run_reuses_what_they_made(calls, tmp_path, capsys):
    assert run_demo(tmp_path / "demo", settings=SETTINGS) == 0
    assert calls == ["corpus", "model", *FROM_FACTORS_ON]
    said = capsys.readouterr().out
    assert all(f"{step}/8" in said for step in range(1, 9))
    assert "nats per token on held-out" in said
    calls.clear()
    assert run_demo(tmp_path / "demo", settings=SETTINGS) == 0
    assert calls == ["inspect"]
    again = capsys.readouterr().out
    assert again.count("reused") == 6
    assert answers_with_modules(DemoPaths(tmp_path / "demo")) in said
    assert answers_with_modules(DemoPaths(tmp_path / "demo")) in again


def test_each_querys_top_texts_are_shown_with_the_modules_of_their_rows(calls, tmp_path):
    run_demo(tmp_path, settings=SETTINGS)
    blocks = answers_with_modules(DemoPaths(tmp_path)).split("\n\n")
    assert len(blocks) == len(QUERIES) == 3
    for number, block in enumerate(blocks):
        rows = [line.split() for line in block.splitlines()[4:]]
        assert [row[0] for row in rows] == [f"m{10 * number + rank}" for rank in range(1, 6)]
        assert [row[1:4] for row in rows][1] == ["source", "-2", "-4.00%"]
        assert rows[0][4:6] == ["def", f"function_{10 * number + 1}(value):"]


def test_another_number_of_workers_reuses_factors_and_scores(calls, tmp_path):
    run_demo(tmp_path, workers=2, settings=SETTINGS)
    calls.clear()
    run_demo(tmp_path, workers=3, settings=SETTINGS)
    assert calls == ["inspect"]


def test_a_new_model_needs_new_factors_scores_and_report(calls, tmp_path):
    run_demo(tmp_path, settings=SETTINGS)
    remove_paths(tmp_path / "model")
    calls.clear()
    run_demo(tmp_path, settings=SETTINGS)
    assert calls == ["model", *FROM_FACTORS_ON]


def test_new_factors_need_new_scores_and_a_new_report(calls, tmp_path):
    run_demo(tmp_path, settings=SETTINGS)
    remove_paths(tmp_path / "factors")
    calls.clear()
    run_demo(tmp_path, settings=SETTINGS)
    assert calls == FROM_FACTORS_ON


def test_scores_of_old_factors_are_gone_before_new_ones_are_fitted(calls, tmp_path, monkeypatch):
    run_demo(tmp_path, settings=SETTINGS)
    remove_paths(tmp_path / "factors")
    monkeypatch.setattr(steps, "call", lambda *_: 1)
    assert run_demo(tmp_path, settings=SETTINGS) == 1
    assert not (tmp_path / "scores").exists()
    assert not (tmp_path / "report.html").exists()


def test_other_settings_make_everything_anew(calls, tmp_path, capsys):
    run_demo(tmp_path, settings=SETTINGS)
    calls.clear()
    assert run_demo(tmp_path, settings=replace(SETTINGS, max_steps=3)) == 0
    assert calls == ["corpus", "model", *FROM_FACTORS_ON]
    assert "made anew" in capsys.readouterr().out


def test_a_store_of_another_configuration_is_fitted_again(calls, tmp_path):
    run_demo(tmp_path, settings=SETTINGS)
    config = yaml.safe_load((tmp_path / "estimate.yaml").read_text())
    write_store({**config, "batch_tokens": 1})
    calls.clear()
    run_demo(tmp_path, settings=SETTINGS)
    assert calls == FROM_FACTORS_ON


def test_an_unfinished_store_of_this_run_is_left_for_estimate_to_go_on_with(
    calls, tmp_path, monkeypatch
):
    run_demo(tmp_path, settings=SETTINGS)
    write_store(yaml.safe_load((tmp_path / "estimate.yaml").read_text()), complete=False)
    found = []
    monkeypatch.setattr(steps, "call", lambda *_: found.append((tmp_path / "factors").exists()))
    monkeypatch.setattr(run, "show_answers", lambda _: None)
    run_demo(tmp_path, settings=SETTINGS)
    assert found == [True] * len(FROM_FACTORS_ON)


def unfinished(scores):
    (scores / "manifest.json").unlink()


def of_another_configuration(scores):
    config = yaml.safe_load((scores.parent / "query.yaml").read_text())
    remove_paths(scores)
    write_scores(config, batch_tokens=1)


def of_other_queries(scores):
    config = yaml.safe_load((scores.parent / "query.yaml").read_text())
    remove_paths(scores)
    Path(config["queries"]).write_text(json.dumps({"prompt": "1 + 1 = ", "completion": "2"}))
    write_scores(config)


def with_a_changed_file(scores):
    with (scores / "top.jsonl").open("a") as file:
        file.write("\n")


@pytest.mark.parametrize(
    "spoil", [unfinished, of_another_configuration, of_other_queries, with_a_changed_file]
)
def test_scores_that_are_not_whole_or_not_these_are_computed_again(calls, tmp_path, spoil):
    run_demo(tmp_path, settings=SETTINGS)
    spoil(tmp_path / "scores")
    calls.clear()
    assert run_demo(tmp_path, settings=SETTINGS) == 0
    assert calls == ["inspect", "query", "report"]


def test_a_report_that_is_gone_is_written_again(calls, tmp_path):
    run_demo(tmp_path, settings=SETTINGS)
    remove_paths(tmp_path / "report.html")
    calls.clear()
    run_demo(tmp_path, settings=SETTINGS)
    assert calls == ["inspect", "report"]


def test_without_jinja2_the_report_alone_is_left_out(calls, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steps.importlib.util, "find_spec", lambda name: None)
    assert run_demo(tmp_path, settings=SETTINGS) == 0
    assert "report" not in calls
    assert "left out, for it needs jinja2" in capsys.readouterr().out


def test_the_queries_are_new_but_their_modules_are_among_the_first_rows(library_rows):
    rows = library_rows
    for query in QUERIES:
        assert not any(query[part].strip() in row.text for row in rows for part in query)
    modules = {row.module for row in rows[: DemoSettings().max_sequences]}
    assert {"_pydecimal", "urllib.parse", "xml.dom.minidom"} <= modules


def test_a_failing_step_ends_the_demo_with_its_status(calls, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(steps, "call", lambda step, _: taken.append(step) or 3)
    assert run_demo(tmp_path, settings=SETTINGS) == 3
    assert taken == ["estimate"]
    assert not (tmp_path / "scores").exists()


def test_a_commands_status_is_passed_on_with_a_sentence(capfd):
    assert commands.call("estimate", [sys.executable, "-c", "import sys; sys.exit(5)"]) == 5
    assert "`estimate` ended with exit status 5" in capfd.readouterr().err


def test_a_command_ended_by_a_signal_has_a_shells_status(capfd):
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    assert commands.call("estimate", command) == 137


def test_a_demo_that_is_ended_ends_its_commands(tmp_path):
    child = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(600)"
    parent = (
        "import sys; from ekfac_dist.demo.commands import call, ends_its_children\n"
        f"with ends_its_children(): call('step', [sys.executable, '-c', {child!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    child_id = int(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    process.stdout.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child_id, 0)


def test_a_directory_with_something_else_in_it_is_never_touched(calls, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("precious")
    with pytest.raises(OutputError, match="new or empty"):
        run_demo(tmp_path, settings=SETTINGS)
    assert (tmp_path / "model" / "mine").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert calls == []


@pytest.mark.parametrize("marker", ["{}", "[]", "no json", '{"format": "other/1"}'])
def test_a_file_that_only_has_the_markers_name_is_no_permission(calls, tmp_path, marker):
    (tmp_path / "demo.json").write_text(marker)
    with pytest.raises(OutputError, match="new or empty"):
        run_demo(tmp_path, settings=SETTINGS)
    assert calls == []


def test_a_file_in_the_directorys_place_is_an_error(calls, tmp_path):
    (tmp_path / "demo").write_text("a file")
    with pytest.raises(OutputError, match="new or empty"):
        run_demo(tmp_path / "demo", settings=SETTINGS)


def test_no_workers_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="workers is 0"):
        run_demo(tmp_path / "demo", workers=0)
    assert not (tmp_path / "demo").exists()


def test_the_written_configurations_are_what_they_should_be(calls, tmp_path):
    run_demo(tmp_path, workers=3, settings=SETTINGS)
    paths = DemoPaths(tmp_path.resolve())
    estimate = yaml.safe_load(paths.estimate_config.read_text())
    assert estimate == run.job_of(paths, SETTINGS).estimate.as_dict()
    assert estimate["model"]["name"] == str(paths.model)
    assert estimate["data"]["max_sequences"] == SETTINGS.max_sequences
    query = yaml.safe_load(paths.query_config.read_text())
    assert query == run.job_of(paths, SETTINGS).query.as_dict()
    assert query["factors"] == estimate["output"]
    assert query["queries"] == str(paths.queries)
    assert [json.loads(line) for line in paths.queries.read_text().splitlines()] == QUERIES
    launcher = load_config_from_file(str(paths.accelerate_config))
    assert launcher.distributed_type == DistributedType.MULTI_GPU
    assert launcher.use_cpu is True
    assert launcher.num_processes == 3


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_the_demo_makes_a_whole_store_scores_and_a_report(workers, tmp_path, capfd):
    shape = replace(SETTINGS.shape, context=256)  # a query has to fit
    settings = replace(SETTINGS, shape=shape, vocab_size=1024, max_steps=20)
    assert run_demo(tmp_path, workers=workers, settings=settings) == 0
    said = capfd.readouterr().out
    assert "8/8 report" in said
    paths = DemoPaths(tmp_path.resolve())
    assert configs.is_whole_store(paths, run.job_of(paths, settings))
    assert configs.is_whole_answer(paths, run.job_of(paths, settings))
    assert answers_with_modules(paths) in said
    page = paths.report.read_bytes()
    assert b"first_element" in page
    assert run_demo(tmp_path, workers=workers, settings=settings) == 0
    assert capfd.readouterr().out.count("reused") == 6
    assert paths.report.read_bytes() == page
