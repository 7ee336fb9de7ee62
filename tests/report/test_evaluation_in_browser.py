"""The page of an evaluation in Chromium; see `test_page_in_browser`."""

import pytest
from helpers.browser import DESKTOP, PHONE, facts, fits, number
from helpers.made_evaluation import METHODS, made_evaluation, write_evaluation

from ekfac_dist.report.evaluation_page import write_beside

pytestmark = pytest.mark.browser


@pytest.fixture
def opened(open_page, tmp_path):
    """Opens the page of an evaluation; see `open_page`."""

    def open_evaluation(results, viewport=DESKTOP, **settings):
        write_beside(write_evaluation(tmp_path / "run", results))
        return open_page(tmp_path / "run" / "evaluation.html", viewport, **settings)

    return open_evaluation


def lds_of(results, key):
    (row,) = [row for row in results["rows"] if row["key"] == key]
    return row["lds"]["by_query"]


def chosen(page, results):
    """The LDS by query of the two methods that are chosen."""
    rows = (page.locator(f"#{box}").input_value() for box in ("across", "up"))
    return [results["rows"][int(row)]["lds"]["by_query"] for row in rows]


def difference(across, up):
    return [b - a for a, b in zip(across, up, strict=True)]


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"protocols": ("recall",)}, {"methods": METHODS[:1]}, {"seeds": (0,), "num_queries": 1}],
    ids=str,
)
def test_every_kind_of_evaluation_opens_and_fits(opened, settings, viewport, scheme):
    results = made_evaluation(**settings)
    page = opened(results, viewport, color_scheme=scheme)
    assert fits(page)
    assert page.locator("#results tbody tr").count() == len(results["rows"])
    has_lds = "lds" in settings.get("protocols", ("lds",))
    assert page.locator(".plot.wide").count() == has_lds
    if has_lds:
        assert page.locator(".plot.wide").is_visible() == (viewport is DESKTOP)
        assert page.locator(".plot.narrow").is_visible() == (viewport is PHONE)
        assert page.locator("#scatter circle").count() == len(results["queries"])


def test_the_page_has_the_results_numbers_without_its_script(opened):
    results = made_evaluation()
    page = opened(results, java_script_enabled=False)
    assert page.locator("noscript").is_visible()
    means = page.locator("#results td.lds:nth-of-type(1) .mean").all_inner_texts()
    assert [number(mean) for mean in means] == [
        pytest.approx(row["lds"]["mean"], abs=5.1e-4) for row in results["rows"]
    ]
    assert page.locator(".plot.wide svg").is_visible()


def test_queries_are_listed_by_the_difference_of_the_chosen_methods(opened):
    results = made_evaluation()
    page = opened(results)
    assert chosen(page, results)[0] == lds_of(results, results["plain"])
    page.select_option("#across", label="gradient dot")
    page.select_option("#up", label="K-FAC, damping 10")
    across, up = chosen(page, results)
    assert (across, up) == (lds_of(results, "gradient_dot"), lds_of(results, "kfac-10"))
    rows = page.locator("#query-rows tr")
    order = sorted(range(12), key=lambda k: across[k] - up[k])
    for place, k in enumerate(order):
        cells = [number(text) for text in rows.nth(place).locator("td").all_inner_texts()]
        assert cells == pytest.approx([across[k], up[k], up[k] - across[k]], abs=5.1e-4)
        assert rows.nth(place).locator("th").inner_text().startswith(f"{k + 1} ")
    assert "pair: Query 11 asks → Paris 0 · Query 11 asks → Paris 1" in rows.all_inner_texts()[
        order.index(11)
    ].replace("\n", "")
    text = page.locator("#pair-text").inner_text()
    above = sum(value > 0 for value in difference(across, up))
    assert f"Of 12 queries {above} are above" in text
    heads = page.locator("#by-query thead th").all_inner_texts()
    assert heads == ["Query", "gradient dot", "K-FAC, damping 10", "Difference"]


def test_a_point_is_where_its_query_is_and_says_which_it_is(opened):
    results = made_evaluation(seed=2)
    page = opened(results)
    across, up = chosen(page, results)
    centres = [
        (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        for box in (page.locator(f"#point-{k}").bounding_box() for k in range(12))
    ]
    x = [number(text) for text in (f"{value}" for value in across)]
    for first, second in ((0, 5), (3, 8), (11, 2)):
        slope = (centres[first][0] - centres[second][0]) / (x[first] - x[second])
        rise = (centres[first][1] - centres[second][1]) / (up[first] - up[second])
        assert slope > 0 > rise
        assert slope / -rise == pytest.approx(page_ratio(page), rel=0.02)
    page.locator("#point-4").hover(force=True)
    seen = list(facts(page, "#tooltip").values())
    expected = [across[4], up[4], up[4] - across[4]]
    assert [number(value) for value in seen] == pytest.approx(expected, abs=5.1e-4)
    assert "Query 4 asks" in page.locator("#tooltip p").inner_text()
    assert "active" in page.locator("#query-4").get_attribute("class")


def page_ratio(page):
    """Width over height of the plot of queries, without its margins."""
    return page.evaluate(
        """() => {
          const [first] = document.querySelectorAll("#scatter .grid");
          const grids = [...document.querySelectorAll("#scatter .grid")];
          const tops = grids.map((node) => node.getBoundingClientRect().top);
          return first.getBoundingClientRect().width / (Math.max(...tops) - Math.min(...tops));
        }"""
    )


def test_the_keyboard_reads_the_points_and_the_selects_choose(opened):
    results = made_evaluation()
    page = opened(results)
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "scatter":
            break
    across, up = chosen(page, results)
    order = sorted(range(12), key=lambda k: (across[k], up[k]))
    for key, place in (("ArrowRight", 0), ("ArrowRight", 1), ("End", 11), ("ArrowLeft", 10)):
        page.keyboard.press(key)
        point = page.locator("#scatter").get_attribute("aria-activedescendant")
        assert point == f"point-{order[place]}"
        label = page.locator(f"#{point}").get_attribute("aria-label")
        assert label.startswith(f"Query {order[place] + 1}, ")
        values = [number(value) for value in facts(page, "#tooltip").values()]
        assert values[0] == pytest.approx(across[order[place]], abs=5.1e-4)
    page.keyboard.press("Escape")
    assert page.locator("#tooltip").is_hidden()
    page.locator("#up").focus()
    page.keyboard.press("Home")
    assert page.locator("#up").input_value() == "0"
    assert page.locator("#name-up").inner_text() == "random"


def test_every_stop_of_the_tab_key_is_named_and_its_focus_seen(opened):
    page = opened(made_evaluation())
    stops = []
    for _ in range(12):
        page.keyboard.press("Tab")
        stop = page.evaluate(
            """() => {
              const node = document.activeElement;
              const by = document.getElementById(node.getAttribute("aria-labelledby"));
              const label = node.getAttribute("aria-label") || by?.innerText
                || node.labels?.[0]?.innerText || node.innerText;
              return [node.id || node.className || node.tagName, label.trim(),
                getComputedStyle(node).outlineStyle];
            }"""
        )
        if stop[0] == "BODY":
            break
        stops.append(stop)
    assert [name for name, *_ in stops] == [
        "scroll", "across", "up", "scatter", "scroll tall", "scroll", "SUMMARY",
    ]  # fmt: skip
    assert all(label and outline == "solid" for _, label, outline in stops)


CONTRASTS = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => c / 255)
      .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ratio = (one, two) => {
    const [low, high] = [light(one), light(two)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const paper = parse(getComputedStyle(document.body).backgroundColor);
  const of = (selector, property) => [...document.querySelectorAll(selector)]
    .map((node) => ratio(parse(getComputedStyle(node)[property]), paper));
  return [Math.min(...of("h1, h2, p, th, td, td span, li, dt, dd", "color")),
    Math.min(...of("svg text", "fill")), Math.min(...of(".lds-plot .dot", "fill"))];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_marks_stand_out(opened, scheme):
    text, labels, marks = opened(made_evaluation(), color_scheme=scheme).evaluate(CONTRASTS)
    assert text >= 4.5
    assert labels >= 4.5
    assert marks >= 3


@pytest.mark.parametrize("spacing", ["normal", "0.15em"], ids=["narrow font", "wide font"])
def test_in_print_nothing_is_cut_off(opened, spacing):
    """Whichever font there is: one with wide letters stands for those that are not installed."""
    results = made_evaluation(num_queries=40)
    page = opened(results, viewport={"width": 720, "height": 1000}, bypass_csp=True)
    page.emulate_media(media="print")
    page.add_style_tag(content=f"table {{ letter-spacing: {spacing}; }}")
    assert fits(page)
    assert page.locator("#query-39").is_visible()
    cut = page.evaluate(
        "[...document.querySelectorAll('.scroll')].map((n) => n.scrollHeight > n.clientHeight + 1)"
    )
    assert cut == [False, False, False]


def test_hostile_names_and_texts_are_shown_as_text(opened):
    text = "</script><img src=x onerror=alert(1)>\u202e\x00"
    methods = (*METHODS, ("scores", text, "", False))
    page = opened(made_evaluation(methods=methods, text=text, model=text))
    assert page.locator("img").count() == 0
    seen = "</script><img src=x onerror=alert(1)>U+202E␀"
    assert page.locator("h1 .model").inner_text() == seen
    assert page.locator("#results th[scope=rowgroup]").last.inner_text() == seen
    assert seen in page.locator("#up option").last.inner_text()
    assert seen in page.locator("#query-3 th").inner_text()
