"""The page and the plot of an evaluation: the numbers of its results, and nothing else."""

import copy
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from helpers.made_evaluation import METHODS, PROTOCOLS, made_evaluation, write_evaluation
from helpers.pages import HOSTILE, Page, require_nothing_from_elsewhere, require_own_policy
from helpers.workshop import run_here

from ekfac_dist.config import RefineConfig
from ekfac_dist.errors import ConfigError, OutputError, StoreError
from ekfac_dist.report.evaluation_page import write_beside, write_evaluation_page
from ekfac_dist.report.evaluation_words import found

PATHS = {
    "LDS": ("lds",),
    "over EK-FAC": ("over_plain",),
    "removal": ("removal",),
    "tail patch": ("tail_patch",),
    "reciprocal rank": ("recall", "mrr"),
    "recall@10": ("recall", "recall10"),
}
SIGNED = ("over EK-FAC", "removal")


class Tables(HTMLParser):
    """The tables of a page by their id: rows of (tag, attributes, text)."""

    def __init__(self, html):
        super().__init__()
        self.tables, self.rows, self.cell = {}, None, None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.rows = self.tables.setdefault(dict(attributes).get("id"), [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.cell = [tag, dict(attributes), ""]
            self.rows[-1].append(self.cell)

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self.cell = None

    def handle_data(self, text):
        if self.cell is not None:
            self.cell[2] += text


@pytest.fixture
def page_of(tmp_path):
    def write(results):
        output = tmp_path / "page.html"
        write_evaluation_page(write_evaluation(tmp_path / "run", results), output)
        return Page(output.read_text(encoding="utf-8"))

    return write


def value_at(row, path):
    for name in path:
        row = row.get(name, {})
    return row


def shown(estimate, signed):
    """An estimate as the page shows it."""
    numbers = (f"{estimate[name]:{'+' if signed else ''}.3f}" for name in ("mean", "low", "high"))
    return "{} [{}, {}]".format(*numbers).replace("-", "−")


# -- the table -------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocols", [PROTOCOLS, ("lds",), ("tail_patch", "recall")], ids=str)
def test_the_table_has_the_results_numbers(page_of, protocols):
    results = made_evaluation(protocols=protocols)
    head, *lines = Tables(page_of(results).html).tables["results"]
    titles = [cell[2] for cell in head]
    measured = [name for name in PATHS if name in titles]
    assert titles == ["Method", "Damping", *measured, "Seconds"]
    named = {"lds": 2, "removal": 1, "tail_patch": 1, "recall": 2}
    assert len(measured) == sum(named[protocol] for protocol in protocols)
    assert len(lines) == len(results["rows"])
    name = None
    for cells, row in zip(lines, results["rows"], strict=True):
        if cells[0][1].get("scope") == "rowgroup":
            name = cells.pop(0)[2]
        assert name == row["name"]
        damping, *estimates, seconds = (cell[2].strip() for cell in cells)
        assert damping.split()[0] == ("–" if row["damping"] is None else f"{row['damping']:g}")
        assert seconds == f"{row['seconds'][0]:.1f}"
        for title, text in zip(measured, estimates, strict=True):
            estimate = value_at(row, PATHS[title])
            if title == "over EK-FAC" and row["key"] == results["plain"]:
                assert text == "reference"
            elif estimate:
                assert text.endswith(shown(estimate, title in SIGNED))
            else:
                assert text == "–"


def test_dampings_of_a_method_are_one_group_and_its_best_is_marked(page_of):
    results = made_evaluation()
    _, *lines = Tables(page_of(results).html).tables["results"]
    spans = [cells[0][1]["rowspan"] for cells in lines if cells[0][1].get("scope") == "rowgroup"]
    assert spans == [str(3 if damped else 1) for *_, damped in METHODS]
    marked = [k for k, cells in enumerate(lines) if any("best" in cell[2] for cell in cells)]
    best = []
    for name, tracked in {(row["name"], row["tracked"]) for row in results["rows"]}:
        family = [r for r in results["rows"] if (r["name"], r["tracked"]) == (name, tracked)]
        if len(family) > 1:
            best.append(max(family, key=lambda row: row["lds"]["mean"]))
    assert marked == sorted(results["rows"].index(row) for row in best)


def test_a_difference_is_marked_where_its_interval_excludes_zero(page_of):
    results = made_evaluation()
    for row, (low, high) in zip(
        [row for row in results["rows"] if row["key"] != results["plain"]],
        [(0.01, 0.2), (-0.2, -0.01), (-0.1, 0.1), (0.0, 0.1), (-0.1, 0.0)],
        strict=False,
    ):
        row["over_plain"] = {"mean": (low + high) / 2, "low": low, "high": high}
    _, *lines = Tables(page_of(results).html).tables["results"]
    verdicts = []
    for cells, row in zip(lines, results["rows"], strict=True):
        if row["key"] != results["plain"]:
            text = cells[-6][2]
            low, high = (row["over_plain"][end] for end in ("low", "high"))
            verdicts.append((text.startswith("above"), text.startswith("below")))
            assert verdicts[-1] == (low > 0, high < 0)
    assert verdicts[:5] == [(True, False), (False, True), *[(False, False)] * 3]


def test_headings_have_scopes_and_every_scroll_box_is_reached_by_keyboard(page_of):
    page = page_of(made_evaluation())
    headings = [attributes for tag, attributes in page.elements if tag == "th"]
    assert all(each["scope"] in ("col", "row", "rowgroup") for each in headings)
    boxes = [a for _, a in page.elements if "scroll" in (a.get("class") or "").split()]
    assert len(boxes) == 3
    assert all(box["tabindex"] == "0" and box["role"] == "region" for box in boxes)
    assert all("aria-label" in box or "aria-labelledby" in box for box in boxes)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a}
    assert named <= set(ids)


# -- the plot --------------------------------------------------------------------------------------


def plots_of(page):
    drawn = re.findall(r"<svg.*?</svg>", page.html, re.DOTALL)
    return [ElementTree.fromstring(svg) for svg in drawn]


def classes(svg):
    """The elements of a plot by their class."""
    return {element.get("class"): element for element in svg.iter()}


def local(element):
    return element.tag.rpartition("}")[2]


def scale_of(svg):
    """The value at a height, from the labels of the grid."""
    labels = [
        (float(text.text.replace("−", "-")), float(text.get("y")) - 4)
        for text in svg.iter()
        if local(text) == "text" and text.get("text-anchor") == "end" and text.get("class") is None
        if re.fullmatch(r"−?[\d.]+", text.text)
    ]
    (first, top), (last, bottom) = labels[0], labels[-1]
    return lambda y: first + (y - top) * (last - first) / (bottom - top)


def marks_of(svg):
    """Of each row of the results: its title, and the values that its interval is drawn between."""
    value = scale_of(svg)
    marks = {}
    for group in svg.iter():
        title = next((child for child in group if local(child) == "title"), None)
        if local(group) == "g" and title is not None:
            (interval,) = [child for child in group if child.get("class") == "interval"]
            _, low, high = re.fullmatch(r"M([\d.]+) ([\d.]+)V([\d.]+)", interval.get("d")).groups()
            dot = next(child for child in group if "dot" in child.get("class", ""))
            marks[title.text] = (value(float(low)), value(float(high)), "best" in dot.get("class"))
    return marks


@pytest.mark.parametrize("seed", [0, 1])
def test_each_plot_has_every_row_with_its_interval(page_of, seed):
    results = made_evaluation(seed=seed)
    plots = plots_of(page_of(results))
    assert [int(svg.get("width")) for svg in plots] == [900, 340]
    for svg in plots:
        marks = marks_of(svg)
        assert len(marks) == len(results["rows"])
        for row in results["rows"]:
            damping = "" if row["damping"] is None else f", damping {row['damping']:g}"
            low, high, _ = marks[f"{row['name']}{damping}: LDS {shown(row['lds'], False)}"]
            assert (low, high) == pytest.approx((row["lds"]["low"], row["lds"]["high"]), abs=2e-3)
        assert sum(best for _, _, best in marks.values()) == sum(damped for *_, damped in METHODS)
        starts = re.findall(r"M([\d.]+) ", ElementTree.tostring(svg, "unicode"))
        assert max(map(float, starts)) <= int(svg.get("width"))


def test_the_noise_ceiling_and_its_root_are_lines(page_of):
    results = made_evaluation()
    ceiling = results["ceiling"]
    for svg in plots_of(page_of(results)):
        value = scale_of(svg)
        lines = classes(svg)
        for kind, expected in (("ceiling", ceiling["mean"]), ("root", ceiling["mean"] ** 0.5)):
            y = float(re.match(r"M[\d.]+ ([\d.]+)H", lines[kind].get("d"))[1])
            assert value(y) == pytest.approx(expected, abs=2e-3)
        top = float(lines["band"].get("y"))
        assert value(top) == pytest.approx(ceiling["high"], abs=2e-3)
        bottom = top + float(lines["band"].get("height"))
        assert value(bottom) == pytest.approx(ceiling["low"], abs=2e-3)


def test_with_one_seed_there_is_no_ceiling(page_of):
    page = page_of(made_evaluation(seeds=(3,)))
    assert "ceiling" not in page.text
    assert not any({"ceiling", "root", "band"} & set(classes(svg)) for svg in plots_of(page))


def test_without_lds_there_is_neither_plot_nor_comparison(page_of):
    page = page_of(made_evaluation(protocols=("recall",)))
    assert plots_of(page) == []
    assert page.data["rows"] == []
    assert not {"scatter", "across"} & {a.get("id") for _, a in page.elements}


def test_the_plots_file_needs_nothing_around_it(tmp_path):
    run = write_evaluation(tmp_path, made_evaluation())
    write_beside(run)
    text = (run / "lds.svg").read_text(encoding="utf-8")
    svg = ElementTree.fromstring(text)
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(marks_of(svg)) == len(made_evaluation()["rows"])
    assert "var(" not in text
    assert "@media" not in text
    assert "#b42318" in text


# -- queries ---------------------------------------------------------------------------------------


def test_the_island_has_each_querys_lds_and_text(page_of):
    results = made_evaluation()
    data = page_of(results).data
    expected = [row["lds"]["by_query"] for row in results["rows"]]
    assert [row["by_query"] for row in data["rows"]] == expected
    for query, expected in zip(data["queries"], results["queries"], strict=True):
        assert query == {name: expected[name] for name in ("group", "members")}
    across, up = (results["rows"][k] for k in data["pair"])
    assert across["key"] == results["plain"]
    others = [row for row in results["rows"] if row is not across]
    assert up is max(others, key=lambda row: row["lds"]["mean"])


@pytest.mark.parametrize("methods", [METHODS[:2], METHODS[:1]], ids=len)
def test_without_plain_ekfac_the_two_best_are_compared(page_of, methods):
    results = made_evaluation(methods=methods)
    assert results["plain"] is None
    page = page_of(results)
    assert sorted(page.data["pair"]) == ([0, 1] if len(methods) == 2 else [0, 0])
    assert "Plain EK-FAC" not in page.text


# -- words -----------------------------------------------------------------------------------------


def test_the_page_says_what_was_measured(page_of):
    results = made_evaluation()
    results["config"]["training"] |= {"start": "random", "warmup_steps": 7, "clip_norm": None}
    results["config"]["lds"]["keep"] = 0.95
    text = " ".join(page_of(results).text.split())
    for words in (
        "runs/base (LlamaForCausalLM, 1,234,567 parameters, float32), trained from random weights",
        "4 epochs, 16 sequences in a step; learning rate 0.0005, after 7 steps of warm-up, then "
        "linearly to zero; weight decay 0; gradients not clipped",
        "2,000 sequences, 124,049 positions, of text.jsonl, at most 64 tokens each",
        "12 queries of 13 lines, those of a group summed, from queries.jsonl",
        "0 and 1, each with a model",
        "100 for each seed, 200 in all, on random 95 % of the sequences; 2:00:01 of training",
        "The first 10 queries, each without its top 5 % of the sequences, against 5 random",
        "171 models, 1:00:00 of training",
        "5 top sequences",
        "11 of the queries name the sequences",
        "2 workers; AMD EPYC 9B45",
    ):
        assert words in text


def test_the_page_says_how_solutions_were_refined(page_of):
    methods = ["ekfac", "ekfac_cg", "ekfac_astra"]
    refined = RefineConfig(method="astra", batch=8)
    results = made_evaluation(methods=METHODS[4:6], rank=32)
    results["config"] |= {"methods": methods, "astra": vars(refined)}
    text = " ".join(page_of(results).text.split())
    for words in (
        "CGat most 20 iterations, with 256 training sequences, the same in all",
        "ASTRAat most 300 iterations, with 8 training sequences, others in each",
        "Query gradientsof rank 32, approximate",
    ):
        assert words in text


def test_a_model_that_was_not_trained_has_no_recipe(page_of):
    results = made_evaluation(seeds=(0,), protocols=("tail_patch", "recall"))
    results["config"]["training"]["epochs"] = 0
    for name in ("steps", "first_loss", "last_loss"):
        del results["seeds"][0][name]
    page = page_of(results)
    text = " ".join(page.text.split())
    assert "float32), not trained, but explained as it is" in text
    assert "AdamW" not in text
    head, _ = Tables(page.html).tables["seeds"]
    assert [cell[2] for cell in head] == ["Seed", "Fit, seconds"]


def test_the_page_says_what_was_found(page_of):
    results = made_evaluation()
    best = max(results["rows"], key=lambda row: row["lds"]["mean"])
    (plain,) = [row for row in results["rows"] if row["key"] == results["plain"]]
    text = " ".join(page_of(results).text.split())
    assert f"The highest LDS is {shown(best['lds'], False)}: {best['name']}" in text
    assert f"Plain EK-FAC at its best damping has {shown(plain['lds'], False)}" in text
    above = text[text.index("Above plain EK-FAC beyond the 95 % interval") :]
    assert f"{best['name']} ({shown(best['over_plain'], True)})" in above
    for row in results["rows"]:
        row["over_plain"] = {"mean": 0.0, "low": -0.1, "high": 0.1}
    assert found(results)[-1] == "No method is above plain EK-FAC beyond the 95 % interval."


def test_the_table_of_seeds_has_the_results_numbers(page_of):
    results = made_evaluation()
    head, *lines = Tables(page_of(results).html).tables["seeds"]
    assert len(head) == 9
    for cells, seed in zip(lines, results["seeds"], strict=True):
        assert [cell[2] for cell in cells] == [
            str(seed["seed"]),
            "500",
            f"{seed['first_loss']:.3f}",
            f"{seed['last_loss']:.3f}",
            f"{seed['fit_seconds']:.1f}",
            "100",
            "3,600.5",
            str(seed["removal_models"]),
            "1,800.2",
        ]


# -- safety ----------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_elsewhere_and_has_its_own_policy(page_of):
    page = page_of(made_evaluation())
    require_nothing_from_elsewhere(page)
    require_own_policy(page)


@pytest.mark.parametrize("text", [*HOSTILE, "".join(HOSTILE), "\ud83d"], ids=ascii)
def test_hostile_names_and_texts_are_inert(page_of, tmp_path, text):
    methods = (*METHODS[:6], ("ekfac", f"EK-FAC, {text}", text, True), ("scores", text, "", False))
    results = made_evaluation(methods=methods, text=text, model=text or "m")
    results["processor"] = text
    results["queries"][-1]["group"] = text
    page = page_of(results)
    assert [tag for tag, _ in page.elements if tag in ("script", "img")] == ["script"] * 2
    require_own_policy(page)
    assert not set("\x00\x01\x1b\u202e\u202c") & set(page.html)
    assert page.data["queries"][0]["members"][0]["completion"] == f" {text} 0"
    assert len(plots_of(page)) == 2
    write_beside(tmp_path / "run")
    svg = ElementTree.fromstring((tmp_path / "run" / "lds.svg").read_text(encoding="utf-8"))
    assert not any(local(element) in ("img", "script") for element in svg.iter())


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
    for name in set(made) - {"format", "plain"}:
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
