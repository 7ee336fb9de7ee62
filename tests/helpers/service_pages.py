"""What tests do on the service's page, and read from it."""

import base64
import json
import time

import pytest

from helpers.browser import DESKTOP, PHONE

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
