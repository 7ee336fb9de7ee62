"""The plot of an evaluation, in its page and in a file of its own."""

import re
from xml.etree import ElementTree

import pytest
from helpers.made_evaluation import METHODS, made_evaluation, shown, write_evaluation
from helpers.pages import local, plots_of

from ekfac_dist.report.evaluation_page import write_beside


def classes(svg):
    """The elements of a plot by their class."""
    return {element.get("class"): element for element in svg.iter()}


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
