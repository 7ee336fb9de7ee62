"""The service's page without a browser: its files, its policy, and what it is made of."""

import re
import sys

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from helpers.pages import Page

from ekfac_dist.errors import ConfigError
from ekfac_dist.report.page import COMPONENTS, write_report
from ekfac_dist.serve.page import SCRIPTS, page_html, page_routes, service_file


@pytest.fixture
def client():
    app = FastAPI()
    page_routes(app)
    return TestClient(app)


def test_what_the_page_links_to_is_there_and_comes_from_the_service_alone(client):
    page = Page(client.get("/").text)
    links = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data", "poster")
    ]
    assert links == ["data:,", "static/page.css", "static/page.js"]
    kinds = {"static/page.css": "text/css", "static/page.js": "text/javascript"}
    for link, kind in kinds.items():
        response = client.get(f"/{link}")
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(kind)
        assert re.findall(r"https?://[^\"]*", response.text) in ([], ["http://www.w3.org/2000/svg"])
        assert "@import" not in response.text
        assert "url(" not in response.text


def test_its_policy_lets_it_speak_to_the_service_and_run_nothing_inline(client):
    response = client.get("/")
    parts = dict(
        part.strip().split(" ", 1)
        for part in response.headers["content-security-policy"].split(";")
    )
    assert parts["default-src"] == "'none'"
    assert {parts[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
    assert parts["form-action"] == parts["base-uri"] == parts["frame-ancestors"] == "'none'"
    page = Page(response.text)
    assert [text.strip() for text in page.scripts] == [""]
    assert "<style" not in page.html
    assert "http-equiv" not in page.html  # one policy: the header
    assert not any(name.startswith("on") or name == "style" for _, a in page.elements for name in a)


def test_text_reaches_it_only_as_text(client):
    script = client.get("/static/page.js").text
    forbidden = r"\b(innerHTML|outerHTML|insertAdjacentHTML|eval|Function|document\.write)\b\s*[(=]"
    assert not re.search(forbidden, script)


def test_it_is_made_of_the_reports_components(client, tmp_path):
    from helpers.made_results import Made

    write_report(Made().write(tmp_path / "scores"), tmp_path / "report.html")
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    script = client.get("/static/page.js").text
    for name in COMPONENTS:
        text = service_file(name)
        assert text in script
        assert text in report
    assert set(COMPONENTS) < set(SCRIPTS)


def test_every_element_that_its_scripts_name_is_in_the_page():
    page = Page(page_html())
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    script = "".join(map(service_file, ("base.js", *SCRIPTS)))
    named = set(re.findall(r'byId\("([\w-]+)"\)', script))
    named |= {f"ask-{name}" for name in re.findall(r'field\("([\w-]+)"\)', script)}
    assert len(named) > 50
    assert named - ids == set()
    labels = [a["for"] for tag, a in page.elements if tag == "label" and "for" in a]
    assert set(labels) < ids


def test_nothing_of_the_service_is_in_the_page_itself(client):
    # Who has no token sees it.
    assert client.get("/").text == page_html()
    assert client.post("/").status_code == 405
    assert client.get("/static/service.js").status_code == 404
    assert client.get("/static/..%2fpage.py").status_code == 404


def test_the_page_is_in_no_description_of_the_service(client):
    assert client.get("/openapi.json").json()["paths"] == {}


def test_without_jinja2_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigError, match=r"needs jinja2; install it with: pip install"):
        page_routes(FastAPI())
