"""The service's page in Chromium: the question, the keyboard, and a screen reader.

bash launch/setup.sh test,browser && bash launch/test.sh -m browser
"""

import base64
import json

import pytest
from helpers.browser import DESKTOP, facts, fits, number
from helpers.service_pages import (
    BOTH,
    CANCELLED,
    ask,
    question_in,
    text_of,
    until,
    wait,
    write,
)

pytestmark = pytest.mark.browser


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


def test_a_token_that_begins_in_the_prompt_is_named(serve, open_service):
    _, url = serve()
    page = open_service(url)
    ask(page, "Paris", "The tower is in ")
    wait(page)
    note = "The token “Paris” begins in the prompt, so it is not among them."
    assert note in text_of(page, "#query .note")


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


@BOTH
def test_a_chat_is_asked_and_its_address_asks_it_again(serve, open_service, viewport):
    service, url = serve()
    service.chats = True
    page = open_service(url, viewport)
    write(page, completion="In Paris.", prompt="Where is the tower?")
    page.check("#ask-chat")
    assert page.locator("#mark-part").is_hidden()
    assert fits(page)
    page.click("#ask button[type=submit]")
    wait(page)
    chat = [
        {"role": "user", "content": "Where is the tower?"},
        {"role": "assistant", "content": "In Paris."},
    ]
    assert service.asked == [{"messages": chat}]
    assert "<user>Where is the tower?<assistant>" in text_of(page, "#query")
    again = open_service(page.url, viewport)
    wait(again)
    assert service.asked[1] == service.asked[0]
    assert again.is_checked("#ask-chat")
    assert again.input_value("#ask-prompt") == "Where is the tower?"
    assert again.input_value("#ask-completion") == "In Paris."
    again.uncheck("#ask-chat")
    assert again.locator("#mark-part").is_visible()
    again.click("#ask button[type=submit]")
    wait(again)
    assert service.asked[2] == {"prompt": "Where is the tower?", "completion": "In Paris."}


def test_the_model_answers_a_chat_anew(serve, open_service):
    service, url = serve()
    service.chats = True
    page = open_service(url)
    write(page, completion="Nowhere.", prompt="Where is the tower?")
    page.check("#ask-chat")
    page.click("#go-on")
    until(page, "document.getElementById('ask-completion').value === ' in Paris.'")
    chat = [{"role": "user", "content": "Where is the tower?"}]
    assert service.completions == [{"messages": chat, "max_tokens": 32}]


def test_where_there_is_no_chat_template_no_chat_is_offered(serve, open_service):
    _, url = serve()
    page = open_service(url)
    until(page, "document.title.includes('Influence on')")
    assert page.locator("#chat-part").is_hidden()


def test_an_address_of_a_chat_without_fields_for_it_is_not_asked(serve, open_service):
    service, url = serve()
    for messages in ([], [{"role": "user", "content": "a"}], "ab", [None, None]):
        key = base64.urlsafe_b64encode(json.dumps({"messages": messages}).encode()).decode()
        page = open_service(f"{url}#q={key.rstrip('=')}")
        page.wait_for_selector("#ask-note:not(:empty)")
        assert "no question that can be read" in text_of(page, "#ask-note")
    assert service.asked == []
