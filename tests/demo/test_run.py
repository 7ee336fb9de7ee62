import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from ekfac_dist.demo import run
from ekfac_dist.demo.model import ModelShape
from ekfac_dist.demo.run import DemoPaths, DemoSettings, run_demo
from ekfac_dist.errors import ConfigError, OutputError
from ekfac_dist.runtime.store import FORMAT, MANIFEST_KEYS

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
        if step == "estimate":
            config = yaml.safe_load(Path(command[-1]).read_text())
            write_store(config)
        return 0

    original_train_model = run.train_model
    monkeypatch.setattr(run, "write_corpus", write_corpus)
    monkeypatch.setattr(run, "train_model", train_model)
    monkeypatch.setattr(run, "_call", call)
    return called


def write_store(config, **changes):
    manifest = {"format": FORMAT, "complete": True, **{key: {} for key in MANIFEST_KEYS}}
    store = Path(config["output"])
    store.mkdir(exist_ok=True)
    (store / "manifest.json").write_text(json.dumps({**manifest, "config": config, **changes}))


def test_all_steps_are_taken_once_and_a_second_run_takes_the_last_alone(calls, tmp_path, capsys):
    assert run_demo(tmp_path / "demo", settings=SETTINGS) == 0
    assert calls == ["corpus", "model", "estimate", "inspect"]
    said = capsys.readouterr().out
    assert all(f"{step}/5" in said for step in range(1, 6))
    assert "nats per token on held-out" in said
    calls.clear()
    assert run_demo(tmp_path / "demo", settings=SETTINGS) == 0
    assert calls == ["inspect"]
    assert capsys.readouterr().out.count("reused") == 4


def test_another_number_of_workers_reuses_the_factors(calls, tmp_path):
    run_demo(tmp_path, workers=2, settings=SETTINGS)
    calls.clear()
    run_demo(tmp_path, workers=3, settings=SETTINGS)
    assert calls == ["inspect"]


def test_a_new_model_needs_new_factors(calls, tmp_path):
    run_demo(tmp_path, settings=SETTINGS)
    run._remove(tmp_path / "model")
    calls.clear()
    run_demo(tmp_path, settings=SETTINGS)
    assert calls == ["model", "estimate", "inspect"]


def test_other_settings_make_everything_anew(calls, tmp_path, capsys):
    run_demo(tmp_path, settings=SETTINGS)
    calls.clear()
    other = DemoSettings(**{**SETTINGS.__dict__, "max_steps": 3})
    assert run_demo(tmp_path, settings=other) == 0
    assert calls == ["corpus", "model", "estimate", "inspect"]
    assert "made anew" in capsys.readouterr().out


def test_a_store_of_another_configuration_is_fitted_again(calls, tmp_path):
    run_demo(tmp_path, settings=SETTINGS)
    config = yaml.safe_load((tmp_path / "estimate.yaml").read_text())
    write_store({**config, "batch_tokens": 1})
    calls.clear()
    run_demo(tmp_path, settings=SETTINGS)
    assert calls == ["estimate", "inspect"]


def test_an_unfinished_store_of_this_run_is_left_for_estimate_to_go_on_with(
    calls, tmp_path, monkeypatch
):
    run_demo(tmp_path, settings=SETTINGS)
    write_store(yaml.safe_load((tmp_path / "estimate.yaml").read_text()), complete=False)
    found = []
    monkeypatch.setattr(run, "_call", lambda *_: found.append((tmp_path / "factors").exists()) or 0)
    run_demo(tmp_path, settings=SETTINGS)
    assert found == [True, True]


def test_a_failing_step_ends_the_demo_with_its_status(calls, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(run, "_call", lambda step, _: steps.append(step) or 3)
    assert run_demo(tmp_path, settings=SETTINGS) == 3
    assert steps == ["estimate"]


def test_a_commands_status_is_passed_on_with_a_sentence(capfd):
    assert run._call("estimate", [sys.executable, "-c", "import sys; sys.exit(5)"]) == 5
    assert "`estimate` ended with exit status 5" in capfd.readouterr().err


def test_a_command_ended_by_a_signal_has_a_shells_status(capfd):
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    assert run._call("estimate", command) == 137


def test_a_demo_that_is_ended_ends_its_commands(tmp_path):
    child = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(600)"
    parent = (
        "import sys; from ekfac_dist.demo import run\n"
        f"with run._ends_its_children(): run._call('step', [sys.executable, '-c', {child!r}])"
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
    config = yaml.safe_load(paths.estimate_config.read_text())
    assert config == run.estimate_config(paths, SETTINGS).as_dict()
    assert config["model"]["name"] == str(paths.model)
    assert config["data"]["max_sequences"] == SETTINGS.max_sequences
    launcher = load_config_from_file(str(paths.accelerate_config))
    assert launcher.distributed_type == DistributedType.MULTI_GPU
    assert launcher.use_cpu is True
    assert launcher.num_processes == 3


@pytest.mark.slow
def test_the_demo_makes_a_whole_store_with_two_workers(tmp_path, capfd):
    settings = DemoSettings(**{**SETTINGS.__dict__, "vocab_size": 1024, "max_steps": 20})
    assert run_demo(tmp_path, workers=2, settings=settings) == 0
    said = capfd.readouterr().out
    assert "5/5 inspect" in said
    paths = DemoPaths(tmp_path.resolve())
    assert run.is_whole_store(paths.factors, run.estimate_config(paths, settings))
    assert run_demo(tmp_path, workers=2, settings=settings) == 0
    assert capfd.readouterr().out.count("reused") == 4
