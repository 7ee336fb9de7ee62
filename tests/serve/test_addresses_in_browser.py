"""The service's page in Chromium: questions in the address, and the way back to them.

bash launch/setup.sh test,browser && bash launch/test.sh -m browser
"""

import base64
import json

import pytest
from helpers.service_pages import BOTH, ask, listed, text_of, until, wait

pytestmark = pytest.mark.browser


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
    assert text_of(page, "#sequence-title") == f"Sequence #{service.order('top')[0]}"
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
