"""The service's page in Chromium: answers as they come, and text of any kind in them.

bash launch/setup.sh test,browser && bash launch/test.sh -m browser
"""

import pytest
from helpers.browser import DESKTOP, PHONE, facts, fits, number
from helpers.fake_service import GROWN
from helpers.service_pages import BOTH, ask, chosen, listed, text_of, until, wait

pytestmark = pytest.mark.browser


# -- an answer as it comes -------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_question_gets_its_ranking_then_exact_scores_and_then_their_order(
    serve, open_service, viewport, scheme
):
    service, url = serve()
    service.hold("sequence")
    service.hold("answer")
    page = open_service(url, viewport, color_scheme=scheme)
    assert page.locator("#answer").is_hidden()
    ask(page)
    page.wait_for_selector("#canvas-rows .row")
    assert service.asked == [{"prompt": "The tower is in", "completion": " Paris"}]
    made = service.made
    assert listed(page) == made.top[0]
    assert "All 60 sequences are ranked" in text_of(page, "#status-text")
    scores = page.locator("#canvas-rows .score").all_inner_texts()
    assert all(score.startswith("≈ ") for score in scores)
    assert number(scores[0][2:]) == pytest.approx(
        float(made.scores_QN[0, made.top[0][0]]), rel=1e-3
    )
    assert page.locator(".exact").count() == 0
    assert "have not come yet" not in text_of(page, "body").lower() or viewport is DESKTOP
    assert fits(page)

    service.release("sequence")
    until(page, "document.querySelectorAll('#canvas-rows .exact').length === 8")
    assert listed(page) == made.top[0]
    assert text_of(page, "#status-count") == "15 of 16"
    assert page.locator("#cancel").is_visible()

    service.release()
    wait(page)
    assert listed(page) == service.order("top")
    assert listed(page) != made.top[0]
    assert text_of(page, "#status-text") == (
        "Answered: 0.30 s waiting, 1.1 s for the ranking of all 60 sequences, "
        "8.2 s for exact scores."
    )
    assert "0.987" in text_of(page, "#query")
    assert page.locator("#cancel").is_hidden()
    assert fits(page)


def test_exact_scores_come_one_by_one(serve, open_service):
    service, url = serve()
    service.hold("sequence", after=3)
    page = open_service(url)
    ask(page)
    until(page, "document.querySelectorAll('#canvas-rows .exact').length === 2")
    exact = [bool(row.locator(".exact").count()) for row in page.locator("#canvas-rows .row").all()]
    assert exact == [True, True, *[False] * 6]  # top 1, bottom 1, top 2
    marks = page.locator(".exact").first
    assert marks.get_attribute("aria-label") == "scored exactly"
    chosen_now = int(text_of(page, "#sequence-title").rpartition("#")[2])
    assert chosen_now == service.made.top[0][0]
    assert page.locator(".token.unscored").count() == 1  # all others have scores
    page.locator("#canvas-rows .row").nth(4).click()
    assert "has not come yet" in text_of(page, "#tokens-note")
    assert page.locator("#layers").is_hidden()
    page.click("#list-bottom")
    assert page.locator(".exact").count() == 1
    service.release()
    wait(page)
    assert listed(page) == service.order("bottom")
    assert page.locator(".exact").count() == 8


@BOTH
def test_the_chosen_sequence_stays_chosen_and_where_it_is(serve, open_service, viewport):
    service, url = serve(num_sequences=200, listed=40)
    service.hold("answer")
    page = open_service(url, viewport)
    ask(page)
    until(page, "document.querySelectorAll('.exact').length > 5")
    before, after = service.made.top[0], service.order("top")
    index = next(i for i in before[12:30] if abs(before.index(i) - after.index(i)) > 2)
    page.locator("#rows").focus()
    for _ in range(before.index(index)):
        page.keyboard.press("j")
    assert text_of(page, "#sequence-title") == f"Sequence #{index}" or viewport is PHONE
    top = chosen(page).bounding_box()["y"]
    service.release()
    wait(page)
    assert (
        page.locator("#rows").get_attribute("aria-activedescendant") == f"row-{after.index(index)}"
    )
    assert chosen(page).inner_text().split("\n")[0] == str(after.index(index) + 1)
    assert chosen(page).bounding_box()["y"] == pytest.approx(
        top, abs=90 if viewport is PHONE else 2
    )
    assert page.evaluate("document.activeElement.id") == "rows"
    assert f"sequence={index}" in page.url or viewport is PHONE


@BOTH
def test_without_a_choice_the_first_by_exact_scores_is_chosen_in_the_end(
    serve, open_service, viewport
):
    service, url = serve()
    service.hold("answer")
    page = open_service(url, viewport)
    ask(page)
    until(page, "document.querySelectorAll('.exact').length === 8")
    before, after = service.made.top[0][0], service.order("top")[0]
    assert before != after
    assert chosen(page).locator(".which").inner_text().endswith(f"#{before}")
    assert "sequence=" not in page.url  # what nobody chose is not followed when it is opened again
    service.release()
    wait(page)
    assert chosen(page).get_attribute("id") == "row-0"
    assert page.locator("#rows").evaluate("node => node.scrollTop") == 0
    if viewport is DESKTOP:
        assert text_of(page, "#sequence-title") == f"Sequence #{after}"
        assert f"sequence={after}" in page.url
        assert number(facts(page, "#sequence-facts")["Score"]) == pytest.approx(
            service.scores()[1][after], rel=1e-3
        )


@pytest.mark.parametrize("way", ["click", "step", "focus"])
def test_the_indexs_first_stays_if_the_reader_has_chosen_it(serve, open_service, way):
    service, url = serve()
    service.hold("answer")
    page = open_service(url)
    ask(page)
    until(page, "document.querySelectorAll('.exact').length === 8")
    before = service.made.top[0][0]
    if way == "click":
        page.locator("#row-0").click()
    elif way == "step":
        page.click("#step-on")
        page.click("#step-back")
    else:
        page.focus("#tokens")
    service.release()
    wait(page)
    assert text_of(page, "#sequence-title") == f"Sequence #{before}"
    assert f"sequence={before}" in page.url


def test_what_is_read_of_tokens_stays_while_the_list_is_sorted(serve, open_service):
    service, url = serve()
    service.hold("answer")
    page = open_service(url)
    ask(page)
    until(page, "document.querySelectorAll('.exact').length === 8")
    page.locator("#rows").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert page.locator(".token.active").get_attribute("id") == "token-1"
    service.release()
    wait(page)
    assert page.locator(".token.active").get_attribute("id") == "token-1"
    assert page.locator("#tooltip").is_visible()


def test_a_sequence_that_is_listed_no_more_stays_to_be_read(serve, open_service):
    service, url = serve()
    service.drops = 3
    service.hold("answer")
    page = open_service(url)
    ask(page)
    until(page, "document.querySelectorAll('.exact').length === 8")
    order = sorted(service.made.top[0], key=lambda i: -service.scores()[1][i])
    page.locator(f"#row-{service.made.top[0].index(order[-1])}").click()
    service.release()
    wait(page)
    assert text_of(page, "#sequence-title") == f"Sequence #{order[-1]}"
    assert facts(page, "#sequence-facts")["Rank"] == "not among the listed ones, by exact scores"
    assert chosen(page).count() == 0
    page.locator("#token-2").hover()
    assert "Score" in facts(page, "#tooltip")
    page.click("#step-on")
    assert text_of(page, "#sequence-title") == f"Sequence #{order[0]}"


def test_tokens_layers_and_distribution_show_the_answers_numbers(serve, open_service):
    service, url = serve()
    page = open_service(url)
    ask(page)
    wait(page)
    index = service.order("top")[1]
    page.locator("#row-1").click()
    detail, exact = service.detail(index), service.scores()[1][index]
    seen = facts(page, "#sequence-facts")
    assert number(seen["Score"]) == pytest.approx(exact, rel=1e-3)
    wanted = float(service.made.scores_QN[0, index])
    assert number(seen["Score in the scan"]) == pytest.approx(wanted, rel=1e-3)
    assert exact == pytest.approx(wanted * (GROWN if index % 2 else 1))
    page.locator("#token-3").hover()
    seen = facts(page, "#tooltip")
    assert number(seen["Score"]) == pytest.approx(detail["token_scores"][3], rel=1e-3)
    page.locator("#bar-2").hover()
    seen = facts(page, "#tooltip")
    assert number(seen["Score"]) == pytest.approx(sum(detail["module_scores"][6:9]), rel=1e-3)
    box = page.locator("#map canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 8.5 / 24, box["y"] + box["height"] * 3.5 / 4)
    seen = facts(page, "#tooltip")
    assert number(seen["Score"]) == pytest.approx(detail["layer_token_scores"][3][8], rel=0.06)
    assert page.locator("#histogram rect").count() > 5
    assert text_of(page, "#spread-title") == "All 60 scores of this question"
    assert "the scan's, of rank 1: approximate" in text_of(page, "#spread-text")
    seen = facts(page, "#answer-facts")
    assert (seen["Damping"], seen["Index"]) == ("λ = 0.1 × mean(Λ)", "rank 1, bfloat16")
    assert "Positive: more of this sequence" in facts(page, "#answer-meaning")["Sign"]


def test_the_indexs_ranking_alone_says_why_there_are_no_tokens(serve, open_service):
    service, url = serve()
    page = open_service(url)
    page.click("#ask-options summary")
    page.fill("#ask-rescore", "0")
    ask(page)
    wait(page)
    assert service.asked[0]["rescore"] == 0
    assert listed(page) == service.made.top[0]
    assert "Ask with more of them scored exactly" in text_of(page, "#tokens-note")
    assert "exact scores" not in text_of(page, "#status-text")


def test_the_focus_goes_on_from_a_button_that_goes_away(serve, open_service):
    service, url = serve()
    service.hold("answer")
    page = open_service(url)
    ask(page)
    page.focus("#cancel")
    service.release()
    wait(page)
    assert page.evaluate("document.activeElement.id") == "export"


def test_how_many_wait_before_is_told(serve, open_service):
    service, url = serve()
    service.before = 2
    service.hold("started")
    page = open_service(url)
    ask(page)
    until(page, "document.getElementById('status-text').textContent.startsWith('Waiting')")
    assert text_of(page, "#status-text") == "Waiting: 2 questions are before this one."
    first = text_of(page, "#status-time")
    until(page, f"document.getElementById('status-time').textContent !== '{first}'")


# -- text of any kind ------------------------------------------------------------------------------


@BOTH
def test_hostile_text_is_shown_as_text(serve, open_service, viewport):
    text = "</script><img src=x onerror=alert(1)>\u202e\x00"
    shown = "</script><img src=x onerror=alert(1)>U+202E␀"
    tokens = {i: [text, "\n", "  ", "end"] for i in range(60)}
    _, url = serve(tokens=tokens, model=text)
    page = open_service(url, viewport)
    page.evaluate(
        "(text) => { for (const name of ['prompt', 'completion', 'against']) {"
        " const box = document.getElementById(`ask-${name}`); box.value = text;"
        " box.dispatchEvent(new Event('input')); } }",
        text,
    )
    page.click("#ask button[type=submit]")
    wait(page)
    assert page.locator("img").count() == 0
    assert text_of(page, "#model") == shown
    assert page.title() == f"Influence on {shown}"
    assert text_of(page, "#words") == shown * 2
    assert page.locator("#query .quote").first.inner_text() == shown * 2
    assert shown in page.locator("#row-0 .excerpt").inner_text()
    if viewport is DESKTOP:
        assert page.locator("#token-0").inner_text() == shown
    page.focus("#words")
    page.keyboard.press("End")
    page.keyboard.press("Shift+Home")
    page.keyboard.press("Enter")
    assert page.input_value("#ask-completion") == (text * 2)
    assert fits(page)
