"""Pages of made-up evaluations; and a browser, which opens pages with the network off."""

import pytest
from helpers.browser import DESKTOP, PHONE
from helpers.made_evaluation import write_evaluation
from helpers.pages import Page

from ekfac_dist.report.evaluation_page import write_evaluation_page


@pytest.fixture
def page_of(tmp_path):
    """Writes the page of results, and parses it."""

    def write(results):
        output = tmp_path / "page.html"
        write_evaluation_page(write_evaluation(tmp_path / "run", results), output)
        return Page(output.read_text(encoding="utf-8"))

    return write


@pytest.fixture
def open_page(browser):
    """Opens a page; at the end nothing has been asked of a network and nothing has failed."""
    contexts, faults = [], []

    def judge(route):
        if route.request.url.startswith("file:"):
            route.continue_()
        else:
            faults.append(f"asked for {route.request.url}")
            route.abort()

    def open_file(file, viewport=DESKTOP, address="", **settings):
        phone = viewport is PHONE
        context = browser.new_context(
            viewport=viewport, is_mobile=phone, has_touch=phone, **settings
        )
        contexts.append(context)
        context.set_offline(True)
        context.route("**/*", judge)
        page = context.new_page()
        page.on("console", lambda m: faults.append(m.text) if m.type != "log" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("requestfailed", lambda request: faults.append(f"failed: {request.url}"))
        page.goto(f"{file.as_uri()}{address}")
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert faults == []
