"""What a parser finds in a page, and what holds for every page."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "]]>",
    "\u2028\u2029",
    "\x00\x01\x1b",
    "\u202eevil\u202c",
    "שלום",
    "👩‍👧",
    "&amp;&lt;",
    "\"'`${1}",
    "\n",
    "  ",
]


class Page(HTMLParser):
    """What a parser finds: elements with their attributes, the scripts' content, the text."""

    def __init__(self, html):
        super().__init__()
        self.html, self.elements, self.scripts, self.text = html, [], [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, text):
        if self.cdata_elem == "script":
            self.scripts[-1] += text
        elif self.cdata_elem is None:
            self.text += text

    @property
    def data(self):
        return json.loads(self.scripts[0])


class Tables(HTMLParser):
    """The tables of a page by their id: rows of (tag, attributes, text)."""

    def __init__(self, html):
        super().__init__()
        self.tables, self.rows, self.cell = {}, None, None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.rows = self.tables.setdefault(dict(attributes).get("id"), [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.cell = [tag, dict(attributes), ""]
            self.rows[-1].append(self.cell)

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self.cell = None

    def handle_data(self, text):
        if self.cell is not None:
            self.cell[2] += text


def plots_of(page):
    """The <svg> elements of a page."""
    drawn = re.findall(r"<svg.*?</svg>", page.html, re.DOTALL)
    return [ElementTree.fromstring(svg) for svg in drawn]


def local(element):
    """An element's tag without its namespace."""
    return element.tag.rpartition("}")[2]


def require_nothing_from_elsewhere(page):
    """Asserts that a page loads nothing, and that its own script cannot."""
    links = [
        (tag, name, value)
        for tag, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data", "poster")
    ]
    assert links == [("link", "href", "data:,")]
    own = page.html
    for island in page.scripts[:-1]:
        own = own.replace(island, "")
    assert "@import" not in own
    assert "url(" not in own
    assert re.findall(r"https?://[^\"]*", own) == ["http://www.w3.org/2000/svg"]  # a name
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|innerHTML|eval)\b", own)
    assert not any(name.startswith("on") or name == "style" for _, a in page.elements for name in a)


def require_own_policy(page):
    """Asserts that a page's policy allows its own style and script and nothing else."""
    (policy,) = [
        attributes["content"]
        for tag, attributes in page.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    style = re.search(r"<style>(.*?)</style>", page.html, re.DOTALL).group(1)
    for name, text in (("script-src", page.scripts[-1]), ("style-src", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
