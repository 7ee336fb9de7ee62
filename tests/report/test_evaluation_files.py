"""What an evaluation leaves beside its results; `report`; results that are damaged or missing."""

import copy
import json
import subprocess
import sys

import pytest
from helpers.made_evaluation import made_evaluation, write_evaluation
from helpers.pages import Page
from helpers.workshop import run_here

from ekfac_dist.errors import ConfigError, OutputError, StoreError
from ekfac_dist.report.evaluation_page import write_beside, write_evaluation_page

# -- the command, and what `evaluate` leaves -------------------------------------------------------


def test_report_makes_the_page_of_an_evaluation(tmp_path):
    run = write_evaluation(tmp_path / "run", made_evaluation())
    done = run_here(["report", f"{run}/", "--note", "Texts: <public domain>."])
    assert (done.returncode, done.stderr) == (0, "")
    assert f"The report is in {run}.html" in done.stdout
    page = Page((tmp_path / "run.html").read_text(encoding="utf-8"))
    assert "Texts: <public domain>." in page.text
    again = run_here(["report", run])
    assert again.returncode == 2
    assert "run.html exists already" in again.stderr


def test_the_page_and_the_plot_are_written_beside_the_results_and_anew(tmp_path):
    run = write_evaluation(tmp_path, made_evaluation())
    lines = write_beside(run)
    assert [line.split() for line in lines] == [
        ["plot", str(run / "lds.svg")],
        ["page", str(run / "evaluation.html")],
    ]
    first = (run / "evaluation.html").read_bytes()
    write_evaluation(tmp_path, made_evaluation(protocols=("recall",)))
    assert len(write_beside(run)) == 1
    assert not (run / "lds.svg").exists()  # it would be of other results
    assert (run / "evaluation.html").read_bytes() != first


def test_without_jinja2_the_plot_is_there_and_a_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    run = write_evaluation(tmp_path / "run", made_evaluation())
    plot, page = write_beside(run)
    assert plot.endswith("lds.svg")
    assert page.startswith("page          not written: ")
    assert "pip install 'ekfac_dist[report]'" in page
    assert not (run / "evaluation.html").exists()
    with pytest.raises(ConfigError, match=r"pip install 'ekfac_dist\[report\]'"):
        write_evaluation_page(run, tmp_path / "page.html")


def test_a_page_that_cannot_be_written_is_a_line_and_no_failure(tmp_path):
    run = write_evaluation(tmp_path / "run", made_evaluation())
    (run / "evaluation.html").mkdir()
    plot, page = write_beside(run)
    assert plot.endswith("lds.svg")
    assert "not written" in page
    assert "evaluation.html cannot be written" in page


def test_a_page_needs_nothing_that_only_an_evaluation_needs(tmp_path):
    run = write_evaluation(tmp_path / "run", made_evaluation())
    code = (
        "import sys; sys.modules |= dict.fromkeys(('bm25s', 'scipy', 'matplotlib'));"
        "from ekfac_dist.cli import main; sys.exit(main(['report', sys.argv[1]]))"
    )
    done = subprocess.run([sys.executable, "-c", code, run], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run.html").exists()


# -- results that are damaged or missing -----------------------------------------------------------


def test_an_unfinished_evaluation_is_told(tmp_path):
    (tmp_path / "run" / "seed-0").mkdir(parents=True)
    done = run_here(["report", tmp_path / "run"])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "results.json cannot be read; give the output directory of a finished" in done.stderr
    assert not (tmp_path / "run.html").exists()


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, '{"a": NaN}', "\x00", "[]", "{}"])
def test_results_that_are_none_are_a_sentence(tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text(content)
    with pytest.raises(OutputError, match=r"results\.json (cannot be read|is no result of)"):
        write_evaluation_page(tmp_path / "run", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


HARMLESS = [("ceiling", None), *(("processor", v) for v in (None, "text", 3, [])), ("workers", 3)]


def damages():
    """Ways in which results can lack something: where, and what is there instead."""
    made = made_evaluation()
    for name in sorted(set(made) - {"format", "plain"}):
        for value in ("absent", None, "text", 3, []):
            if (name, value) not in HARMLESS:
                yield (name,), value
    for path in (("rows", 3, "lds", "mean"), ("rows", 2, "key"), ("seeds", 0, "models")):
        yield path, "absent"
    yield ("rows", 5, "lds", "by_query"), [0.5]
    yield ("rows", 5, "lds", "low"), "1"
    yield ("rows", 5, "damping"), "high"
    yield ("queries", 0, "members"), "absent"
    yield ("config", "training", "schedule"), "none such"


@pytest.mark.parametrize(("path", "value"), damages(), ids=str)
def test_results_that_lack_something_are_a_sentence(tmp_path, path, value):
    results = copy.deepcopy(made_evaluation())
    place = results
    for name in path[:-1]:
        place = place[name]
    if value == "absent":
        del place[path[-1]]
    else:
        place[path[-1]] = value
    run = write_evaluation(tmp_path / "run", results)
    with pytest.raises(StoreError, match=r"results\.json lacks something.*Run `evaluate` again"):
        write_evaluation_page(run, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    assert json.loads((run / "results.json").read_text())  # as it was
