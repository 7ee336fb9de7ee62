"""Makes the documentation's pictures of pages.

    bash launch/setup.sh test,browser
    .venv/bin/python docs/make_pictures.py report runs/demo-real/report.html
    .venv/bin/python docs/make_pictures.py service http://127.0.0.1:8000

`report` makes those of docs/real-model.md, from the report of `ekfac-dist demo --real`; `service`
that of docs/service.md, from a service of the same model. CHROMIUM names the browser; Debian's is
looked for without it.
"""

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

IMAGES = Path(__file__).parent / "images"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
# (picture, question, sequence's rank, which list, height of the window)
PICTURES = (
    ("report.png", 1, 1, "top", 900),
    ("report-capital.png", 0, 2, "top", 900),
    ("report-negative.png", 1, 1, "bottom", 900),
)
PROMPT, COMPLETION = "The longest river in Africa is the", " Nile"


def report_pictures(browser: Browser, report: str) -> None:
    """Questions of a report."""
    for name, question, rank, end, height in PICTURES:
        page = browser.new_page(viewport={"width": 1280, "height": height})
        page.goto(Path(report).resolve().as_uri())
        for _ in range(question):
            page.click("#query-on")
        page.click(f"#list-{end}")
        page.locator("#rows .row:not(.head)").nth(rank - 1).click()
        page.locator("nav.queries").evaluate("node => node.scrollIntoView()")
        page.wait_for_timeout(300)
        page.screenshot(path=str(IMAGES / name))
        page.close()


def service_picture(browser: Browser, address: str) -> None:
    """A question that a service answers."""
    width, height, title = 1280, 1560, 95  # the title names the model's directory
    page = browser.new_page(viewport={"width": width, "height": height})
    page.goto(address)
    page.fill("#ask-prompt", PROMPT)
    page.fill("#ask-completion", COMPLETION)
    page.click("#ask button[type=submit]")
    page.get_by_text("for exact scores").wait_for(timeout=120_000)
    page.locator("#rows .row:not(.head)").first.click()
    page.wait_for_timeout(300)
    shown = {"x": 0, "y": title, "width": width, "height": height - title}
    page.screenshot(path=str(IMAGES / "service.png"), clip=shown)
    page.close()


def main() -> None:
    """Takes the pictures that are asked for."""
    what, where = sys.argv[1:]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        {"report": report_pictures, "service": service_picture}[what](browser, where)
        browser.close()


if __name__ == "__main__":
    main()
