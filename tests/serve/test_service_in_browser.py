"""The service's page in Chromium, with a made-up service behind it.

bash launch/setup.sh test,browser && bash launch/test.sh -m browser
"""

import base64
import json
import time

import pytest
from helpers.browser import DESKTOP, PHONE, facts, fits, number
from helpers.fake_service import GROWN

pytestmark = pytest.mark.browser
BOTH = pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
CANCELLED = (r"failed: .*/v1/(influence|complete)$",)  # what a cancelled request looks like


def write(page, completion=" Paris", prompt="The tower is in", against=None):
    page.fill("#ask-prompt", prompt)
    page.fill("#ask-completion", completion)
    if against is not None:
        page.fill("#ask-against", against)


def ask(page, *texts, **more):
    write(page, *texts, **more)
    page.click("#ask button[type=submit]")


def wait(page, status="done"):
    page.wait_for_selector(f"#status.{status}")


def until(page, expression):
    """Waits until it is true; not within the page, whose policy lets nothing be evaluated there."""
    end = time.monotonic() + 10
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(20)


def listed(page):
    """The indices of the sequences in the list, in its order."""
    rows = page.locator("#canvas-rows .row")
    places = [int(row.get_attribute("data-place")) for row in rows.all()]
    names = [row.inner_text().rpartition("#")[2] for row in page.locator(".row .which").all()[1:]]
    return [int(name) for _, name in sorted(zip(places, names, strict=True))]


def chosen(page):
    return page.locator('.row[aria-selected="true"]')


def text_of(page, box):
    return page.locator(box).inner_text()


def question_in(url):
    key = url.partition("#q=")[2].partition("&")[0]
    return json.loads(base64.urlsafe_b64decode(key + "=" * (-len(key) % 4)))


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


# -- the question ----------------------------------------------------------------------------------


def test_the_model_goes_on_and_its_words_are_appended(serve, open_service):
    service, url = serve()
    page = open_service(url)
    page.fill("#ask-prompt", "The tower is")
    page.select_option("#ask-length", "8")
    page.click("#go-on")
    until(page, "document.getElementById('ask-completion').value !== ''")
    assert page.input_value("#ask-completion") == " in Paris."
    assert service.completions == [{"prompt": "The tower is", "max_tokens": 8}]
    assert text_of(page, "#words") == "The tower is in Paris."
    assert "4 tokens" in text_of(page, "#go-on-note")
    page.click("#go-on")
    until(page, "document.getElementById('ask-completion').value.length > 12")
    assert service.completions[1]["prompt"] == "The tower is in Paris."
    assert page.input_value("#ask-completion") == " in Paris. in Paris."


def test_the_model_can_be_stopped(serve, open_service):
    service, url = serve()
    service.hold("complete")
    page = open_service(url, allowed=CANCELLED)
    page.fill("#ask-prompt", "The tower is")
    page.click("#go-on")
    page.get_by_role("button", name="Stop").click()
    until(page, "document.getElementById('go-on-note').textContent === 'Stopped.'")
    assert page.input_value("#ask-completion") == ""
    assert text_of(page, "#go-on") == "Let the model go on"


def test_the_keys_mark_the_words_to_be_explained(serve, open_service):
    service, url = serve()
    page = open_service(url)
    write(page, " in the city of Paris, France.", "The tower is")
    page.focus("#words")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    assert page.evaluate("getSelection().toString()") == " Paris,"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Shift+ArrowRight")
    assert page.evaluate("getSelection().toString()") == " of Paris,"
    selected = page.locator('.word[aria-selected="true"]').all_inner_texts()
    assert selected == [" of", " Paris,"]
    assert text_of(page, "#live") == "Selected: of Paris,"
    page.keyboard.press("Enter")
    assert page.input_value("#ask-prompt") == "The tower is in the city"
    assert page.input_value("#ask-completion") == " of Paris,"
    assert page.locator(".word.rest").all_inner_texts() == [" France."]
    assert "line-through" in page.locator(".word.rest").first.evaluate(
        "(node) => getComputedStyle(node).textDecoration"
    )
    assert page.locator("#rest-key").is_visible()
    page.keyboard.press("Control+Enter")
    wait(page)
    assert service.asked == [{"prompt": "The tower is in the city", "completion": " of Paris,"}]
    page.click("#mark-undo")
    assert page.input_value("#ask-completion") == " in the city of Paris, France."
    assert page.locator(".word.rest").count() == 0


def test_the_pointer_marks_a_part_of_a_word_and_of_what_was_cut_off(serve, open_service):
    _, url = serve()
    page = open_service(url)
    write(page, " Paris, France.")
    page.locator("#word-4").dblclick()  # selects the word, without the space before it
    page.click("#mark")
    assert page.input_value("#ask-prompt") == "The tower is in"
    assert page.input_value("#ask-completion") == " Paris"
    assert text_of(page, "#words") == "The tower is in Paris, France."
    box = page.locator("#word-1").bounding_box()  # " tower", 6 letters wide
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 3.1 * box["width"] / 6, middle)
    page.mouse.down()
    end = page.locator(".word.rest").last.bounding_box()
    page.mouse.move(end["x"] + end["width"] + 1, middle)
    page.mouse.up()
    page.click("#mark")
    assert page.input_value("#ask-prompt") == "The to"
    assert page.input_value("#ask-completion") == "wer is in Paris, France."
    page.fill("#ask-completion", " it")
    assert text_of(page, "#words") == "The to it"


def test_a_language_without_spaces_is_marked_by_its_words(serve, open_service):
    _, url = serve()
    page = open_service(url)
    write(page, "巴黎是法国的首都。", "")
    page.focus("#words")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("getSelection().toString()") == "巴黎"


def test_two_completions_are_asked_against_each_other(serve, open_service):
    service, url = serve()
    page = open_service(url)
    ask(page, against=" Rome")
    wait(page)
    assert service.asked[0]["against"] == " Rome"
    assert page.locator("#query .quote").all_inner_texts() == [
        "The tower is in Paris",
        "The tower is in Rome",
    ]
    assert "log p(completion) − log p(against) = +2.000." in text_of(page, "#query")


def test_options_are_asked_and_come_back_from_the_address(serve, open_service):
    service, url = serve()
    page = open_service(url)
    page.click("#ask-options summary")
    assert page.locator("#ask-iterations").is_disabled()
    for name, value in {"top_k": "7", "rescore": "9", "damping": "0.03"}.items():
        page.fill(f"#ask-{name}", value)
    chosen = {"scale": "trimmed", "normalise": "cosine", "tokens": "outputs", "refine": "cg"}
    for name, value in chosen.items():
        page.select_option(f"#ask-{name}", value)
    page.fill("#ask-iterations", "5")
    ask(page)
    wait(page)
    wanted = {
        "prompt": "The tower is in",
        "completion": " Paris",
        "top_k": 7,
        "rescore": 9,
        "damping": {"value": 0.03, "relative": True, "scale": "trimmed"},
        "normalise": "cosine",
        "tokens": "outputs",
        "refine": {"method": "cg", "iterations": 5},
    }
    assert service.asked == [wanted]
    assert question_in(page.url) == wanted
    assert text_of(page, "#score-name") == "Cosine"
    assert facts(page, "#answer-facts")["Refined"] == "by 20 steps of conjugate gradients"
    assert "the one that is predicted" in text_of(page, "#tokens-note")
    again = open_service(page.url)
    wait(again)
    assert service.asked == [wanted, wanted]
    assert again.input_value("#ask-damping") == "0.03"
    assert again.input_value("#ask-scale") == "trimmed"
    assert again.locator("#ask-options").get_attribute("open") is not None


def test_an_absolute_damping_needs_its_value_and_no_completion_is_said(serve, open_service):
    service, url = serve()
    page = open_service(url)
    ask(page, "")
    assert "There is nothing to explain yet" in text_of(page, "#ask-note")
    assert page.evaluate("document.activeElement.id") == "ask-completion"
    page.click("#ask-options summary")
    page.select_option("#ask-scale", "absolute")
    page.click("#ask-options summary")
    ask(page)
    assert page.evaluate("document.activeElement.id") == "ask-damping"
    assert service.asked == []
    page.fill("#ask-damping", "1e-4")
    ask(page)
    wait(page)
    assert service.asked[0]["damping"] == {"value": 1e-4, "relative": False}


# -- the address -----------------------------------------------------------------------------------


@BOTH
def test_an_address_asks_what_it_holds_and_opens_the_sequence(serve, open_service, viewport):
    service, url = serve()
    page = open_service(url)
    ask(page, " Paris\u202e 👩‍👧", "שלום &q=1#?\n")
    wait(page)
    page.click("#list-bottom")
    page.locator("#row-2").click()
    index = service.order("bottom")[2]
    assert page.url.endswith(f"&list=bottom&sequence={index}")
    other = open_service(page.url, viewport)
    wait(other)
    assert other.input_value("#ask-prompt") == "שלום &q=1#?\n"
    assert service.asked[1] == service.asked[0]
    assert text_of(other, "#sequence-title") == f"Sequence #{index}"
    assert other.locator("#sequence").is_visible()
    assert other.get_by_role("button", name="Negative").get_attribute("aria-pressed") == "true"


def test_back_and_forward_walk_through_answers_without_asking_again(serve, open_service):
    service, url = serve()
    page = open_service(url)
    for completion in (" Paris", " Rome"):
        ask(page, completion)
        wait(page)
        until(page, f"document.querySelector('#query .completion').textContent === '{completion}'")
    page.locator("#row-3").click()
    page.go_back()
    until(page, "document.querySelector('#query .completion').textContent === ' Paris'")
    assert page.input_value("#ask-completion") == " Paris"
    assert text_of(page, "#sequence-title") == f"Sequence #{service.made.top[0][0]}"
    page.go_back()
    page.wait_for_selector("#answer", state="hidden")
    assert page.locator("#status").is_hidden()
    page.go_forward()
    page.go_forward()
    until(page, "document.querySelector('#query .completion').textContent === ' Rome'")
    assert text_of(page, "#sequence-title") == f"Sequence #{service.order('top')[3]}"
    assert len(service.asked) == 2


def test_a_question_goes_on_while_another_is_looked_at(serve, open_service):
    service, url = serve()
    page = open_service(url)
    ask(page)
    wait(page)
    service.hold("answer")
    ask(page, " Rome")
    page.wait_for_selector("#status.asking")
    page.go_back()
    wait(page)
    service.release()
    page.go_forward()
    wait(page)
    until(page, "document.querySelector('#query .completion').textContent === ' Rome'")
    assert listed(page) == service.order("top")
    assert len(service.asked) == 2


def test_an_address_waits_for_a_button_while_another_is_answered(serve, open_service):
    service, url = serve()
    service.hold("answer")
    page = open_service(url)
    ask(page)
    page.wait_for_selector("#canvas-rows .row")
    key = base64.urlsafe_b64encode(b'{"prompt":"x","completion":"y"}').decode().rstrip("=")
    page.evaluate(f"location.hash = '#q={key}'")
    until(page, "document.getElementById('ask-completion').value === 'y'")
    assert "Another question is being answered" in text_of(page, "#ask-note")
    assert len(service.asked) == 1
    assert page.locator("#answer").is_hidden()
    page.keyboard.press("j")  # acts on nothing
    page.click("#ask button[type=submit]")
    page.wait_for_selector("#canvas-rows .row")
    assert service.asked[1] == {"prompt": "x", "completion": "y"}


@pytest.mark.parametrize(
    "address", ["#q=%%%", "#q=e30", "#q=bnVsbA", "#q=", "#list=top&sequence=1", "#q=/w"]
)
def test_an_address_of_nothing_asks_nothing(serve, open_service, address):
    service, url = serve()
    page = open_service(url + address)
    until(page, "document.title.includes('tiny')")
    assert ("holds no question" in text_of(page, "#ask-note")) == address.startswith("#q=")
    assert page.locator("#status").is_hidden()
    assert service.asked == []


def test_what_an_address_holds_besides_is_not_asked(serve, open_service):
    service, url = serve()
    question = {"completion": "y", "top_k": "<b>", "evil": [1], "damping": {"value": "x"}}
    key = base64.urlsafe_b64encode(json.dumps(question).encode()).decode().rstrip("=")
    page = open_service(f"{url}#q={key}")
    wait(page)
    assert service.asked == [{"prompt": "", "completion": "y"}]


# -- what goes wrong -------------------------------------------------------------------------------


@BOTH
def test_a_question_can_be_cancelled(serve, open_service, viewport):
    service, url = serve()
    service.hold("sequence", after=4)
    page = open_service(url, viewport, allowed=CANCELLED)
    ask(page)
    until(page, "document.querySelectorAll('.exact').length === 2")
    page.click("#cancel")
    wait(page, "cancelled")
    assert text_of(page, "#status-text") == "Cancelled. What had come is below."
    assert page.locator("#canvas-rows .row").count() == 8
    page.wait_for_timeout(200)
    assert service.cancelled == ["q1"]
    if viewport is DESKTOP:
        page.locator("#canvas-rows .row").nth(5).click()
        assert "was cancelled before" in text_of(page, "#tokens-note")
    service.release()
    page.click("#ask button[type=submit]")
    wait(page)
    assert page.locator(".exact").count() == 8


@pytest.mark.parametrize("after", ["7", None])
def test_a_full_queue_says_when_to_try_again(serve, open_service, after):
    service, url = serve()
    service.refusal = (429, {"detail": "full"}, {"Retry-After": after} if after else {})
    page = open_service(url, allowed=["status of 429"])
    ask(page)
    wait(page, "failed")
    when = "in 7 seconds" if after else "a little later"
    sentence = f"As many questions wait already as the service takes. Try again {when}."
    assert text_of(page, "#status-text") == sentence
    service.refusal = None
    page.click("#ask button[type=submit]")
    wait(page)


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (
            422,
            {"detail": "top_k is 7, but <b>the index</b> has 3 sequences; give 3 or less."},
            None,
        ),
        (503, {"detail": "The service ends."}, None),
        (
            422,
            {"detail": [{"loc": ["body", "top_k"], "msg": "Input is wrong"}]},
            "top_k: Input is wrong.",
        ),
        (502, "<html>", "The service answered with status 502."),
    ],
)
def test_a_refusal_is_a_sentence(serve, open_service, status, body, sentence):
    service, url = serve()
    service.refusal = (status, body, {})
    page = open_service(url, allowed=[f"status of {status}"])
    ask(page)
    wait(page, "failed")
    assert text_of(page, "#status-text") == (sentence or body["detail"])
    assert page.locator("#answer").is_hidden()
    assert page.locator("#status b").count() == 0


def test_an_error_in_the_middle_leaves_what_had_come(serve, open_service):
    service, url = serve()
    service.fails_at = "answer"
    page = open_service(url)
    ask(page)
    wait(page, "failed")
    assert text_of(page, "#status-text") == "The index is gone.<b> What had come is below."
    assert page.locator(".exact").count() == 8
    assert page.locator("#export").is_hidden()


def test_a_stream_that_breaks_off_is_said(serve, open_service):
    service, url = serve()
    service.breaks_at = "sequence"
    page = open_service(url)
    ask(page)
    wait(page, "failed")
    assert "ended before its answer was whole" in text_of(page, "#status-text")
    assert "ended before this sequence was scored" in text_of(page, "#tokens-note")


def test_a_service_that_is_gone_is_said(serve, open_service):
    _, url = serve()
    page = open_service(url, allowed=["failed: ", "ERR_"])
    until(page, "document.title.includes('tiny')")
    page.context.set_offline(True)
    ask(page)
    wait(page, "failed")
    assert text_of(page, "#status-text").startswith("The service cannot be reached")
    page.click("#go-on")
    until(page, "document.getElementById('go-on-note').textContent.includes('reached')")


@BOTH
def test_a_token_is_asked_for_and_kept_for_the_session_only(serve, open_service, viewport):
    service, url = serve(token="s3cret")
    page = open_service(url, viewport, allowed=["status of 401"])
    dialog = page.get_by_role("dialog", name="This service asks for its token")
    dialog.wait_for()
    assert fits(page)
    page.keyboard.type("wrong one")
    page.keyboard.press("Enter")
    assert "without spaces" in text_of(page, "#token-note")
    page.fill("#token", "wrong")
    page.keyboard.press("Enter")
    until(page, "document.getElementById('token-note').textContent.includes('not take')")
    page.fill("#token", "s3cret")
    page.keyboard.press("Enter")
    until(page, "document.title.includes('tiny')")
    assert dialog.is_hidden()
    ask(page)
    wait(page)
    assert len(service.asked) == 1
    assert "s3cret" not in page.url
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    with page.expect_download() as download:
        page.click("#export")
    assert download.value.suggested_filename == "influence-q1.html"
    page.reload()
    wait(page)
    assert dialog.is_hidden()


def test_without_the_token_it_is_said_what_is_missing(serve, open_service):
    service, url = serve(token="s3cret")
    page = open_service(url, allowed=["status of 401"])
    page.get_by_role("dialog").wait_for()
    page.keyboard.press("Escape")
    until(page, "document.getElementById('subtitle').textContent.includes('gives its token')")
    ask(page)
    page.get_by_role("dialog").wait_for()
    page.click("#token-cancel")
    wait(page, "failed")
    assert text_of(page, "#status-text") == "This service answers who gives its token."
    assert service.asked == []


def test_an_answer_is_saved_as_the_reports_file(serve, open_service, tmp_path):
    service, url = serve()
    page = open_service(url, allowed=["status of 404"])
    ask(page)
    wait(page)
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "<!doctype html><title>q1</title>"
    service.kept = False
    page.click("#export")
    until(page, "document.getElementById('export-note').textContent.includes('Ask again')")


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


# -- by keyboard, and for a screen reader ----------------------------------------------------------


@BOTH
def test_the_keyboard_does_all_of_it(serve, open_service, viewport):
    service, url = serve()
    page = open_service(url, viewport)
    press, active = page.keyboard.press, "document.activeElement.id"

    def tab_to(box, most=30):
        for _ in range(most):
            if page.evaluate(active) == box:
                return
            press("Tab")
        raise AssertionError(f"{box} is not reached; at {page.evaluate(active)}")

    tab_to("ask-prompt")
    page.keyboard.type("The tower is")
    tab_to("go-on")
    press("Enter")
    until(page, "document.getElementById('ask-completion').value !== ''")
    tab_to("words")
    press("End")
    press("Enter")
    assert page.input_value("#ask-completion") == " Paris."
    press("Control+Enter")
    wait(page)
    assert service.asked == [{"prompt": "The tower is in", "completion": " Paris."}]
    tab_to("rows")
    press("ArrowDown")
    press("n")
    press("ArrowDown")
    press("Enter")
    index = service.order("bottom")[1]
    assert text_of(page, "#sequence-title") == f"Sequence #{index}"
    tab_to("tokens")
    press("Home")
    press("ArrowRight")
    seen = facts(page, "#tooltip")
    detail = service.detail(index)
    assert number(seen["Score"]) == pytest.approx(detail["token_scores"][1], rel=1e-3)
    press("Tab")
    press("ArrowDown")
    press("Enter")
    assert page.locator("#layer-select").input_value() == "1"
    press("Escape")
    until(page, "document.activeElement.id === 'rows'")
    assert page.locator("#sequence").is_visible() == (viewport is DESKTOP)
    page.focus("#ask-prompt")
    page.keyboard.type("n/j")  # letters, not keys of the list
    assert page.input_value("#ask-prompt").endswith("n/j")
    press("Escape")
    assert page.evaluate(active) == "ask-prompt"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_stop_of_the_tab_key_is_named_and_its_focus_seen(serve, open_service, scheme):
    _, url = serve()
    page = open_service(url, color_scheme=scheme)
    ask(page, against=" Rome")
    wait(page)
    page.evaluate("document.getElementById('ask-options').open = true")
    page.focus("#ask-prompt")
    stops = []
    for _ in range(60):
        stop = page.evaluate(
            """() => {
              const node = document.activeElement;
              const by = node.getAttribute("aria-labelledby");
              const label = node.getAttribute("aria-label") || node.labels?.[0]?.innerText
                || (by && document.getElementById(by).innerText) || node.innerText;
              const { outlineStyle } = getComputedStyle(node);
              const name = node.id || node.className || node.tagName;
              return [name, (label || "").trim(), outlineStyle];
            }"""
        )
        if stop[0] == "BODY" or (stops and stop[0] == stops[0][0]):
            break
        stops.append(stop)
        page.keyboard.press("Tab")
    wanted = ["ask-prompt", "ask-completion", "go-on", "ask-length", "ask-against", "words"]
    wanted += ["ask-top_k", "ask-damping", "primary", "export", "list-top", "filter", "rows"]
    wanted += ["tokens", "bars", "map"]
    ids = [stop[0] for stop in stops]
    assert [one for one in ids if one in wanted] == wanted
    assert [stop for stop in stops if not stop[1] or stop[2] == "none"] == []


def test_a_screen_reader_is_told_how_far_the_answer_is(serve, open_service):
    service, url = serve()
    service.hold("sequence", after=1)
    page = open_service(url)
    ask(page)
    page.wait_for_selector(".exact")
    assert page.get_by_role("status").filter(has_text="All 60 sequences are ranked").count() == 1
    bar = page.get_by_role("progressbar", name="Progress of the answer")
    assert (bar.evaluate("(bar) => bar.value"), bar.evaluate("(bar) => bar.max")) == (1, 16)
    for role, name in (
        ("form", "Question"),
        ("textbox", "Prompt"),
        ("textbox", "Completion, whose likelihood is explained"),
        ("textbox", "Rather than (optional: another completion, to compare with)"),
        ("listbox", "The very words to be explained"),
        ("grid", "Ranked sequences: up and down choose, Enter opens"),
        ("heading", "Sequences"),
        ("button", "Cancel"),
    ):
        assert page.get_by_role(role, name=name, exact=True).count() == 1, (role, name)
    service.release()
    wait(page)
    ends = page.get_by_role("status").filter(has_text="Answered").count()
    assert ends == 1


@BOTH
@pytest.mark.parametrize(
    "settings",
    [
        {"num_sequences": 3, "listed": 3, "num_layers": 1},
        {"num_sequences": 1, "listed": 1},
        {"num_sequences": 20, "tokens": {i: ["a"] for i in range(20)}},
        {"listed": 0},
        {"num_sequences": 400, "listed": 200},
    ],
    ids=str,
)
def test_every_kind_of_answer_opens(serve, open_service, viewport, settings):
    service, url = serve(**settings)
    page = open_service(url, viewport)
    ask(page)
    wait(page)
    assert fits(page)
    if service.made.listed:
        page.locator("#canvas-rows .row").first.click()
        title = f"Sequence #{service.order('top')[0]}"
        assert text_of(page, "#sequence-title") == title
