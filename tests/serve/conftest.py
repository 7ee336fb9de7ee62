"""A made-up service, and its page in a browser that may ask nothing else."""

import re

import pytest
from helpers.browser import DESKTOP, PHONE
from helpers.fake_service import FakeService, made_answers, running


@pytest.fixture
def serve():
    """Starts made-up services; gives each with its address."""
    started = []

    def start(token=None, **settings):
        service = FakeService(made_answers(**settings), token)
        context = running(service)
        started.append(context)
        return service, context.__enter__()

    yield start
    for context in started:
        context.__exit__(None, None, None)


@pytest.fixture
def open_service(browser):
    """Opens a service's page; at the end it has asked nothing else, and nothing has failed.

    `allowed` are patterns of what may fail, such as "status of 429".
    """
    contexts, faults, allowances = [], [], []

    def open_page(url, viewport=DESKTOP, allowed=(), **settings):
        allowances.extend(allowed)
        phone = viewport is PHONE
        context = browser.new_context(
            viewport=viewport, is_mobile=phone, has_touch=phone, **settings
        )
        contexts.append(context)
        base = re.match(r"http://[^/]+", url).group()

        def judge(route):
            if route.request.url.startswith(base):
                route.continue_()
            else:
                faults.append(f"asked for {route.request.url}")
                route.abort()

        context.route("**/*", judge)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda m: faults.append(m.text) if m.type != "log" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("requestfailed", lambda request: faults.append(f"failed: {request.url}"))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [f for f in faults if not any(re.search(a, f) for a in allowances)] == []
