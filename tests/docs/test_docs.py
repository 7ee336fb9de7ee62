"""README, docs and CONTRIBUTING: short, links that lead somewhere, and answers in one step."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ekfac_dist

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(page):
    """A page without its fenced code."""
    return _FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    """What GitHub makes of a page's headings: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    texts = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", text).replace(" ", "-") for text in texts}


def links(page):
    """Targets of the links of a page that lead into the repository: (path, anchor)."""
    for target in _LINK.findall(prose(page)):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


def test_the_readme_has_at_most_1200_words():
    words = prose(README).split()  # whitespace-separated tokens outside of fenced code
    assert len(words) <= 1200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target, anchor in links(page):
        assert target.exists(), target
        assert target.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(target), f"{target.name}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_is_named_exists(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/.])(?:ekfac_dist|tests|launch|configs|docs)/[\w./-]+\w", text)
    missing = sorted({path for path in named if not (ROOT / path).exists()})
    assert not missing


def test_every_page_is_linked_from_the_readme_and_from_the_index():
    pages = {page for page in DOCS if page.name != "README.md"}
    for start in (README, ROOT / "docs" / "README.md"):
        assert pages <= {target for target, _ in links(start)}, start


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_a_page_begins_with_what_it_answers(page):
    title, _, rest = page.read_text(encoding="utf-8").partition("\n\n")
    assert title.startswith("# ")
    assert rest.startswith("*") or page.name == "README.md"


QUESTIONS = {
    "how to fit on two nodes": ("distributed.md", "several-nodes", "--num_machines 2"),
    "what Λ is": ("method.md", "λ-the-eigenvalue-correction", "Λ = 1/N Σ_n"),
    "where a new MLP layout would be taught": (
        "models.md",
        "where-a-new-mlp-layout-would-be-taught",
        "mlp_blocks.py",
    ),
    "how a killed run goes on": ("long-runs.md", "how-an-interrupted-run-goes-on", "same command"),
    "which file a factor is in": ("store.md", "which-file-a-factor-is-in", "eigenbasis/<factor>"),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_readme_leads_to_the_answer_in_one_step(question):
    name, anchor, answer = QUESTIONS[question]
    page = ROOT / "docs" / name
    assert (page, anchor) in set(links(README))
    assert anchor in anchors(page)
    assert answer in page.read_text(encoding="utf-8")


def test_the_page_of_the_configuration_is_current():
    script = ROOT / "docs" / "make_configuration.py"
    made = subprocess.run(
        [sys.executable, script, "--print"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert made.stdout == page, "make it anew: .venv/bin/python docs/make_configuration.py"


def test_every_field_has_a_row_with_a_meaning():
    from ekfac_dist import config

    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w.]+)` \|.*\| ([^|]+) \|$", page, re.MULTILINE))
    commands = [
        config.EstimateConfig,
        config.PlanConfig,
        config.QueryConfig,
        config.IndexConfig,
        config.EvaluateConfig,
        config.ServeConfig,
    ]
    wanted = {name for command in commands for name in config.field_types(command)}
    assert wanted == set(rows)
    assert all(len(meaning) > 10 for meaning in rows.values())


def test_the_picture_of_the_layers_is_the_contract():
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    contract = layers["contracts"][0]["layers"]
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = page.partition("```\n")[2].partition("\n```")[0]
    names = re.findall(r"^(\w+(?:, \w+)*)  ", picture, re.MULTILINE)
    assert ", ".join(names).split(", ") == contract


def test_the_places_to_teach_a_layout_are_in_the_files_named():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    section = page.partition("layout would be taught\n")[2].partition("\n## ")[0]
    for row in re.findall(r"^\|.*\.py.*$", section, re.MULTILINE):
        files = [(ROOT / "docs" / target).resolve() for target in _LINK.findall(row)]
        sources = "".join(file.read_text(encoding="utf-8") for file in files)
        names = re.findall(r"(?<!\[)`(\w+)`", row)
        assert all(re.search(rf"\b(def|class) {name}\b", sources) for name in names), row


def test_every_folder_of_the_package_has_a_line_of_tests():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    folders = [path.parent.name for path in (ROOT / "ekfac_dist").glob("*/__init__.py")]
    assert folders
    for folder in folders:
        assert f"| `ekfac_dist/{folder}` | `bash launch/test.sh tests/" in page


def test_the_citation_has_the_packages_version():
    assert f"version = {{{ekfac_dist.__version__}}}" in README.read_text(encoding="utf-8")


def test_the_picture_is_small():
    assert (ROOT / "docs" / "images" / "report.png").stat().st_size < 400_000
