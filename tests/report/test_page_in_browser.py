"""The report in Chromium, opened from the disk with the network off.

bash launch/setup.sh test,browser && bash launch/test.sh -m browser
"""

import pytest
from helpers.browser import DESKTOP, PHONE, facts, fits, number
from helpers.made_results import Made

from ekfac_dist.report.page import write_report

pytestmark = pytest.mark.browser


@pytest.fixture
def opened(open_page, tmp_path):
    """Opens a report; see `open_page`."""

    def open_report(made, viewport=DESKTOP, address="", **settings):
        output = tmp_path / "report.html"
        if not output.exists():
            write_report(made.write(tmp_path / "scores"), output)
        return open_page(output, viewport, address, **settings)

    return open_report


def token_score(made, query, index, t):
    p = made.pairs.index((query, index))
    return float(made.details["token_scores"][int(made.details["offsets"][p]) + t])


# -- with a pointer --------------------------------------------------------------------------------


def test_a_pointer_chooses_a_query_a_sequence_and_a_token(opened):
    made = Made(num_queries=3, training_size=60)
    page = opened(made)
    page.select_option("#query-select", "2")
    page.locator("#list-bottom").click()
    page.locator("#canvas-rows .row").nth(4).click()
    index = made.bottom[2][4]
    assert page.locator("#sequence-title").inner_text() == f"Sequence #{index}"
    seen = facts(page, "#sequence-facts")
    assert number(seen["Score"]) == pytest.approx(float(made.scores_QN[2, index]), rel=1e-3)
    assert number(seen["Nats, first order"]) == pytest.approx(made.nats(2, index), rel=1e-3)
    share = number(seen["Share of all negative scores"].rstrip(" %")) / 100
    assert share == pytest.approx(made.share(2, index), rel=1e-2)
    page.locator("#token-3").hover()
    seen = facts(page, "#tooltip")
    assert number(seen["Score"]) == pytest.approx(token_score(made, 2, index, 3), rel=1e-3)
    assert seen["Predicts"].strip() == made.sequences[index][4].strip()
    assert page.locator("#tokens-note").inner_text().count("the one before the prediction") == 1
    page.locator("#token-24").hover()
    assert facts(page, "#tooltip")["Score"] == "none: the last token predicts nothing"
    assert page.url.endswith(f"#query=2&list=bottom&sequence={index}")


def test_a_contrast_shows_both_texts_and_both_losses(opened):
    made = Made(num_queries=2, against=" Rome\u202e", loss=1.25)
    page = opened(made)
    page.select_option("#query-select", "1")
    texts = page.locator("#query .quote").all_inner_texts()
    assert texts == ["The tower was built in Paris", "The tower was built in RomeU+202E"]
    notes = page.locator("#query .member .note").all_inner_texts()
    assert "−log p = 2.25" in notes[0]
    assert "−log p = 4.25" in notes[1]
    assert notes[2].endswith("log p(completion) − log p(against) = +2.000.")
    assert page.locator("#query .key .against").count() == 1
    title = page.locator("#query-select option").nth(1).inner_text()
    assert title == "2 · The tower was built in →  Paris rather than  RomeU+202E"


def test_the_layers_bars_and_map_show_their_values(opened):
    made = Made(num_queries=1)
    page = opened(made)
    index = made.top[0][0]
    p = made.pairs.index((0, index))
    page.locator("#bar-2").hover()
    seen = facts(page, "#tooltip")
    modules = made.details["module_scores"][p, 6:9]
    assert number(seen["Score"]) == pytest.approx(float(modules.sum()), rel=1e-3)
    assert number(seen["mlp.up_proj"]) == pytest.approx(float(modules[1]), rel=1e-3)
    box = page.locator("#map canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 8.5 / 24, box["y"] + box["height"] * 3.5 / 4)
    seen = facts(page, "#tooltip")
    begin, end = made.details["offsets"][p : p + 2].tolist()
    exact = made.details["layer_token_scores"][:, begin:end]
    assert (seen["Layer"], seen["Position"]) == ("3", "8")
    limit = float(exact.abs().max())
    assert number(seen["Score"]) == pytest.approx(float(exact[3, 8]), rel=0.06, abs=limit / 100)
    page.locator("#bar-2").click()
    assert page.locator("#layer-select").input_value() == "2"
    page.locator("#token-5").hover()
    assert "Layer 2" in facts(page, "#tooltip")


def test_scores_of_losses_are_those_of_the_tokens_that_are_predicted(opened):
    made = Made(num_queries=1, of="outputs")
    page = opened(made)
    index = made.top[0][0]
    tokens = made.sequences[index]
    assert "the one that is predicted" in page.locator("#tokens-note").inner_text()
    page.locator("#token-4").hover()
    seen = facts(page, "#tooltip")
    assert number(seen["Score"]) == pytest.approx(token_score(made, 0, index, 3), rel=1e-3)
    assert seen["Predicted after"].strip() == tokens[3].strip()
    assert "Predicts" not in seen
    page.locator("#token-0").hover()
    assert facts(page, "#tooltip")["Score"] == "none: the first token is not predicted"
    assert page.locator("#map .cross").is_hidden()
    page.locator("#token-24").hover()
    seen = facts(page, "#tooltip")
    assert number(seen["Score"]) == pytest.approx(token_score(made, 0, index, 23), rel=1e-3)
    box = page.locator("#map canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 8.5 / 24, box["y"] + box["height"] * 3.5 / 4)
    seen = facts(page, "#tooltip")
    assert (seen["Layer"], seen["Position"]) == ("3", "8")
    assert seen["Predicted after"].strip() == tokens[8].strip()
    assert page.locator(".token.active").get_attribute("id") == "token-9"


def test_the_strongest_token_of_a_flagged_sequence_is_the_predicted_one(opened):
    page = opened(Made(num_queries=1, of="outputs"))
    page.locator("#canvas-rows .row:has(.badge)").first.click()
    page.locator("#sequence-flag button").click()
    assert page.locator(".token.active").get_attribute("id") == "token-9"  # 8 of inputs


def test_colours_have_the_signs_hue_and_the_largest_is_deepest(opened):
    made = Made(num_queries=1)
    page = opened(made, color_scheme="light")
    index = made.top[0][0]
    scores = [token_score(made, 0, index, t) for t in range(24)]
    colours = page.evaluate(
        "[...document.querySelectorAll('.token')].map((n) => getComputedStyle(n).backgroundColor)"
    )
    deepest = max(range(24), key=lambda t: abs(scores[t]))
    hue = "76, 152, 214" if scores[deepest] > 0 else "240, 146, 48"
    assert colours[deepest] == f"rgb({hue})"
    for t, colour in enumerate(colours[:24]):
        if abs(scores[t]) > 0.01 * abs(scores[deepest]):
            assert ("76, 152, 214" in colour) == (scores[t] > 0)


def test_a_flagged_sequence_says_why_and_shows_its_strongest_token(opened):
    made = Made(num_queries=1)
    page = opened(made)
    flagged = page.locator("#canvas-rows .row:has(.badge)")
    assert flagged.first.locator(".badge").inner_text() == "2 tokens"
    flagged.first.click()
    flag = page.locator("#sequence-flag")
    assert "2 tokens of 24 hold 90 % of the sum of the absolute token scores" in flag.inner_text()
    flag.locator("button").click()
    assert page.locator(".token.active").get_attribute("id") == "token-8"


def test_the_filter_keeps_what_contains_the_text(opened):
    made = Made(num_queries=1, tokens={i: [" needle", " in", " hay"] for i in range(0, 60, 2)})
    page = opened(made)
    page.fill("#filter", "needle in")
    wanted = [i for i in made.top[0] if i % 2 == 0]
    assert page.locator("#canvas-rows .row").count() == len(wanted)
    assert page.locator("#ranking-count").inner_text() == f"{len(wanted)} of 8"
    page.fill("#filter", "no such text")
    assert page.locator("#sequence-title").inner_text() == "No sequence chosen"
    page.fill("#filter", "")
    assert page.locator("#canvas-rows .row").count() == 8


# -- with the keyboard alone -----------------------------------------------------------------------


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_keyboard_does_all_of_it(opened, viewport):
    made = Made(num_queries=3)
    page = opened(made, viewport)
    press = page.keyboard.press
    press("]")
    assert page.locator("#query-select").input_value() == "1"
    for _ in range(12):
        if page.evaluate("document.activeElement.id") == "rows":
            break
        press("Tab")
    press("ArrowDown")
    press("j")
    press("n")
    press("End")
    index = made.bottom[1][-1]
    assert page.locator('.row[aria-selected="true"] .which').inner_text().endswith(f"#{index}")
    assert page.locator("#rows").get_attribute("aria-activedescendant") == "row-7"
    press("Enter")
    for _ in range(8):
        if page.evaluate("document.activeElement.id") == "tokens":
            break
        press("Tab")
    assert page.locator("#sequence").is_visible()
    press("Home")
    press("ArrowRight")
    press("ArrowRight")
    seen = facts(page, "#tooltip")
    assert number(seen["Score"]) == pytest.approx(token_score(made, 1, index, 2), rel=1e-3)
    press("ArrowDown")
    press("Tab")
    assert page.evaluate("document.activeElement.id") == "bars"
    press("ArrowDown")
    press("Enter")
    assert page.locator("#layer-select").input_value() == "1"
    press("Tab")
    assert page.evaluate("document.activeElement.id") == "map"
    press("ArrowRight")
    press("ArrowDown")
    seen = facts(page, "#tooltip")
    assert (seen["Layer"], seen["Position"]) == ("1", "1")
    press("Escape")
    page.wait_for_function("document.activeElement.id === 'rows'")
    assert page.locator("#tooltip").is_hidden()
    assert page.locator("#sequence").is_visible() == (viewport is DESKTOP)
    press("/")
    assert page.evaluate("document.activeElement.id") == "filter"


def test_every_stop_of_the_tab_key_is_named_and_its_focus_seen(opened):
    page = opened(Made(num_queries=3))
    stops = []
    for _ in range(40):
        page.keyboard.press("Tab")
        stop = page.evaluate(
            """() => {
              const node = document.activeElement;
              const label = node.getAttribute("aria-label") || node.labels?.[0]?.innerText
                || node.innerText;
              const { outlineStyle } = getComputedStyle(node);
              return [node.id || node.tagName, label.trim(), outlineStyle];
            }"""
        )
        if stop[0] in ("BODY", "query-back", *(s[0] for s in stops)):
            break
        stops.append(stop)
    ids = [stop[0] for stop in stops]
    wanted = ["query-select", "list-top", "filter", "rows", "tokens", "bars", "map", "SUMMARY"]
    assert [one for one in ids if one in wanted] == wanted
    assert all(label and outline == "solid" for _, label, outline in stops)


# -- on a small screen -----------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_opens_a_sequence_over_the_list_and_goes_back(opened, scheme):
    made = Made(num_queries=2, num_layers=12)
    page = opened(made, PHONE, color_scheme=scheme)
    assert fits(page)
    assert page.locator("#sequence").is_hidden()
    page.locator("#canvas-rows .row").nth(1).tap()
    index = made.top[0][1]
    assert page.locator("#sequence-title").inner_text() == f"Sequence #{index}"
    page.locator("#token-3").tap()
    seen = facts(page, "#tooltip")
    assert number(seen["Score"]) == pytest.approx(token_score(made, 0, index, 3), rel=1e-3)
    assert page.evaluate("document.querySelector('#sequence').scrollWidth <= innerWidth")
    box = page.locator("#tooltip").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    page.locator("#step-on").tap()
    assert page.locator("#sequence-title").inner_text() == f"Sequence #{made.top[0][2]}"
    page.go_back()
    assert page.locator("#sequence").is_hidden()
    page.locator("#canvas-rows .row").nth(0).tap()
    page.locator("#close").tap()
    page.wait_for_selector("#sequence", state="hidden")


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_an_address_opens_what_it_names(opened, viewport):
    made = Made(num_queries=2)
    opened(made)
    index = made.bottom[1][3]
    page = opened(made, viewport, f"#query=1&list=bottom&sequence={index}")
    assert page.locator("#sequence-title").inner_text() == f"Sequence #{index}"
    assert page.locator("#sequence").is_visible()
    assert page.locator("#query-select").input_value() == "1"


@pytest.mark.parametrize(
    "address", ["#query=9", "#query=x&list=&sequence=-1", "#%%%", "#sequence=1"]
)
def test_an_address_of_nothing_opens_the_first_query(opened, address):
    page = opened(Made(), address=address)
    assert page.locator("#query-select").input_value() == "0"


# -- shares and nats -------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["none", "cosine"])
def test_without_a_training_size_there_is_no_word_of_nats(opened, normalize):
    made = Made(num_queries=1, normalize=normalize)
    page = opened(made)
    page.locator("#token-3").hover()
    seen = [facts(page, "#tooltip")]
    page.locator("#bar-2").hover()
    seen.append(facts(page, "#tooltip"))
    page.locator("#map canvas").hover()
    seen.append(facts(page, "#tooltip"))
    assert all(not any("nats" in name.lower() for name in some) for some in seen)
    page.locator("summary").click()
    assert "nats" not in page.locator("body").inner_text().lower()
    shares = page.locator("#canvas-rows .share").all_inner_texts()
    found = [number(share.rstrip(" %")) / 100 for share in shares]
    assert found == pytest.approx([made.share(0, i) for i in made.top[0]], rel=1e-2)


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_nats_that_cannot_be_are_marked_and_say_why(opened, viewport):
    made = Made(num_queries=1, training_size=60, loss=4.0)
    page = opened(made, viewport)
    assert fits(page)
    beyond = [made.nats(0, i) > 4 for i in made.top[0]]
    assert {True, False} == set(beyond)
    rows = page.locator("#canvas-rows .row")
    for place, wanted in enumerate(beyond):
        mark = rows.nth(place).locator(".beyond")
        assert mark.count() == wanted
        if wanted:
            assert mark.get_attribute("title") == "too far for first order"
        page.evaluate(f"document.querySelector('#row-{place}').click()")
        note = page.locator("#sequence-note")
        assert note.is_visible() == wanted
        assert not wanted or note.inner_text() == "Nats: too far for first order."
        if viewport is PHONE:
            page.go_back()


# -- text of any script ----------------------------------------------------------------------------


def test_tokens_that_are_read_together_are_one_piece(opened):
    pieces = [
        "Ο",
        " λ",
        "",
        "敏",
        "",
        "",
        "捷",
        "",
        "",
        "👩🏿\u200d🚀",
        *[""] * 10,
        "ab",
        " c",
        "�",
    ]
    made = Made(num_queries=1, tokens=dict.fromkeys(range(60), pieces))
    page = opened(made)
    index = made.top[0][0]
    shown = page.locator("#tokens .token")
    assert shown.all_inner_texts() == [piece for piece in pieces if piece]
    page.locator("#token-3").hover()
    seen = facts(page, "#tooltip")
    total = sum(token_score(made, 0, index, t) for t in (3, 4, 5))
    assert number(seen["Score"]) == pytest.approx(total, rel=1e-3)
    assert seen["Read together"] == "3 tokens, scores summed"
    assert (seen["Predicts"], seen["Position"]) == ("捷", "3 to 5 of 22")
    page.locator("#token-9").hover()
    assert facts(page, "#tooltip")["Read together"] == "11 tokens, scores summed"
    page.locator("#tokens").focus()
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.locator(".token.active").get_attribute("id") == "token-3"
    page.keyboard.press("End")
    assert facts(page, "#tooltip")["Score"] == "none: the last token predicts nothing"
    box = page.locator("#map canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 4.5 / 22, box["y"] + 3)
    seen = facts(page, "#tooltip")
    assert (seen["Token"], seen["Predicts"]) == ("2 of 3 read together", "敏")
    assert page.locator("#tooltip .quoted").inner_text() == "敏"
    assert page.locator(".token.active").get_attribute("id") == "token-3"
    page.fill("#filter", "敏捷👩🏿\u200d🚀")
    assert page.locator("#canvas-rows .row").count() == 8
    excerpt = page.locator("#row-0 .excerpt").inner_text()
    assert "Ο λ敏捷👩🏿\u200d🚀ab c" in excerpt.replace("\n", "")


# -- what results can be ---------------------------------------------------------------------------


def test_hostile_text_is_shown_as_text(opened):
    text = "</script><img src=x onerror=alert(1)>\u202e\x00"
    made = Made(num_queries=1, prompt=text, completion=text, model=text, group=text)
    made.tokens = {i: [text, "\n", "\t", "  ", "end"] for i in range(60)}
    page = opened(made)
    assert page.locator("img").count() == 0
    seen = page.locator("#token-0").inner_text()
    assert seen == "</script><img src=x onerror=alert(1)>U+202E␀"
    assert page.locator("#token-1 .mark").inner_text() == "↵"
    assert page.locator("#token-2 .mark").inner_text() == "→"
    assert page.locator("#query .group").inner_text().startswith(f"Group “{seen}”")
    assert f"group {seen}" in page.locator("#query-select option").first.inner_text()
    assert "blank" in page.locator("#token-3").get_attribute("class")


@pytest.mark.parametrize(
    "settings",
    [
        {"per_token": "none"},
        {"num_queries": 1, "group": "towers"},
        {"normalize": "relatif_l", "rescored": 10},
        {"num_sequences": 3, "listed": 3, "num_layers": 1},
        {"num_sequences": 1, "listed": 1},
        {"num_sequences": 20, "tokens": {i: ["a"] for i in range(20)}},
        {"listed": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_kind_of_results_opens(opened, settings, viewport):
    made = Made(**settings)
    page = opened(made, viewport)
    assert page.locator("#canvas-rows .row").count() == made.listed
    assert fits(page)
    if made.listed:
        page.locator("#canvas-rows .row").first.click()
        assert page.locator("#sequence-title").inner_text() == f"Sequence #{made.top[0][0]}"
    if made.per_token == "none":
        assert "--scores.per_token top" in page.locator("#tokens-note").inner_text()
        assert page.locator("#layers").is_hidden()


def test_a_thousand_sequences_are_a_few_rows_at_a_time(opened):
    made = Made(num_queries=1, num_sequences=1000, listed=1000, num_layers=6, num_tokens=40)
    page = opened(made)
    count = "document.querySelectorAll('#canvas-rows .row').length"
    counts = [page.evaluate(count)]
    for part in (0.25, 0.5, 1.0):
        page.evaluate(
            f"async () => {{ const rows = document.getElementById('rows');"
            f" rows.scrollTop = {part} * rows.scrollHeight;"
            " await new Promise(requestAnimationFrame); await new Promise(requestAnimationFrame); }"
        )
        counts.append(page.evaluate(count))
    assert max(counts) < 40
    assert page.locator("#row-999").is_visible()
    page.locator("#rows").focus()
    for _ in range(30):
        page.keyboard.press("PageUp")
    page.keyboard.press("End")
    assert page.locator("#row-999").get_attribute("aria-selected") == "true"
    assert page.locator("#sequence-title").inner_text() == f"Sequence #{made.top[0][999]}"
    assert page.evaluate("document.querySelectorAll('*').length") < 1500
