"""The page in Chromium with the service itself behind it, of a session without a model."""

import pytest
from helpers.browser import fits
from helpers.fake_session import FakeSession
from helpers.pages import Page
from helpers.service_pages import CANCELLED, ask, listed, text_of, until, wait
from helpers.services import running

pytestmark = pytest.mark.browser
TOKEN = "a-long-token-of-letters"


@pytest.fixture
def session():
    return FakeSession(num_sequences=60)


def test_an_answer_comes_and_is_saved_as_the_report(session, open_service, tmp_path):
    with running(session) as service:
        page = open_service(service.url)
        page.fill("#ask-prompt", "The tower is in")
        page.click("#go-on")
        until(page, "document.getElementById('ask-completion').value !== ''")
        page.click("#ask button[type=submit]")
        wait(page)
        assert page.locator(".exact").count() > 5
        assert page.locator("script").count() == 1  # hostile texts stay texts
        assert fits(page)
        with page.expect_download() as download:
            page.click("#export")
        download.value.save_as(tmp_path / "report.html")
        shown = listed(page)
    report = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert report.data["queries"][0]["top"]["index"][: len(shown)] == shown


def test_a_cancelled_question_stops_its_scan(session, open_service):
    with running(session) as service:
        page = open_service(service.url, allowed=CANCELLED)
        session.gate.clear()
        ask(page)
        until(page, "document.getElementById('status-text').textContent.includes('index')")
        assert session.arrived.wait(10)
        page.click("#cancel")
        wait(page, "cancelled")
        session.gate.set()
        ask(page, " Rome")
        wait(page)
        assert [name for name, _ in session.exact_calls if name == " Paris"] == []


def test_a_refusal_of_the_service_is_its_sentence(session, open_service):
    with running(session) as service:
        page = open_service(service.url, allowed=["status of 422"])
        ask(page, " impossible")
        wait(page, "failed")
        assert text_of(page, "#status-text").startswith("The question: has no token to predict")


def test_without_the_token_only_the_pages_shell_is_given(session, open_service):
    with running(session, token=TOKEN) as service:
        page = open_service(service.url, allowed=["status of 401"])
        page.get_by_role("dialog").wait_for()
        assert "tiny" not in page.content()
        page.fill("#token", TOKEN)
        page.keyboard.press("Enter")
        until(page, "document.title.includes('tiny')")
        ask(page)
        wait(page)
