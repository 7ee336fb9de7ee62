"""The page of an evaluation: the numbers of its results, and nothing else."""

from xml.etree import ElementTree

import pytest
from helpers.made_evaluation import METHODS, PROTOCOLS, made_evaluation, shown
from helpers.pages import (
    HOSTILE,
    Tables,
    local,
    plots_of,
    require_nothing_from_elsewhere,
    require_own_policy,
)

from ekfac_dist.config import RefineConfig
from ekfac_dist.report.evaluation_page import write_beside
from ekfac_dist.report.evaluation_words import found

PATHS = {
    "LDS": ("lds",),
    "over EK-FAC": ("over_plain",),
    "at equal damping": ("over_equal",),
    "removal": ("removal",),
    "tail patch": ("tail_patch",),
    "reciprocal rank": ("recall", "mrr"),
    "recall@10": ("recall", "recall10"),
}
SIGNED = ("over EK-FAC", "at equal damping", "removal")


def value_at(row, path):
    for name in path:
        row = row.get(name, {})
    return row


# -- the table -------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocols", [PROTOCOLS, ("lds",), ("tail_patch", "recall")], ids=str)
def test_the_table_has_the_results_numbers(page_of, protocols):
    results = made_evaluation(protocols=protocols)
    head, *lines = Tables(page_of(results).html).tables["results"]
    titles = [cell[2] for cell in head]
    measured = [name for name in PATHS if name in titles]
    assert titles == ["Method", "Damping", *measured, "Seconds"]
    named = {"lds": 3, "removal": 1, "tail_patch": 1, "recall": 2}
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
            text = cells[-7][2]
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
