"""The service's page in Chromium: what goes wrong, the token, and answers that are saved.

bash launch/setup.sh test,browser && bash launch/test.sh -m browser
"""

import pytest
from helpers.browser import DESKTOP, fits
from helpers.service_pages import BOTH, CANCELLED, ask, text_of, until, wait

pytestmark = pytest.mark.browser


# -- what goes wrong -------------------------------------------------------------------------------


@BOTH
def test_a_question_can_be_cancelled(serve, open_service, viewport):
    service, url = serve()
    service.hold("sequence", after=4)
    page = open_service(url, viewport, allowed=CANCELLED)
    ask(page)
    until(page, "document.querySelectorAll('.exact').length === 2")
    if viewport is DESKTOP:
        page.locator("#canvas-rows .row").nth(5).click()
        assert "has not come yet" in text_of(page, "#tokens-note")
    page.click("#cancel")
    wait(page, "cancelled")
    assert text_of(page, "#status-text") == "Cancelled. What had come is below."
    assert page.locator("#canvas-rows .row").count() == 8
    assert page.evaluate("document.activeElement.id") == "ask-prompt"
    page.wait_for_timeout(200)
    assert service.cancelled == ["q1"]
    if viewport is DESKTOP:
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
