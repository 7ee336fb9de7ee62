"""Makes the pictures of docs/real-model.md from the report of `ekfac-dist demo --real`.

    bash launch/setup.sh test,browser
    .venv/bin/python docs/make_pictures.py runs/demo-real/report.html

CHROMIUM names the browser; Debian's is looked for without it.
"""

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).parent / "images"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
# (picture, question, sequence's rank, which list, height of the window)
PICTURES = (
    ("report.png", 1, 1, "top", 900),
    ("report-capital.png", 0, 2, "top", 900),
    ("report-negative.png", 1, 1, "bottom", 900),
)


def main() -> None:
    """Takes all pictures."""
    report = Path(sys.argv[1]).resolve()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        for name, question, rank, end, height in PICTURES:
            page = browser.new_page(viewport={"width": 1280, "height": height})
            page.goto(report.as_uri())
            for _ in range(question):
                page.click("#query-on")
            page.click(f"#list-{end}")
            page.locator("#rows .row:not(.head)").nth(rank - 1).click()
            page.locator("nav.queries").evaluate("node => node.scrollIntoView()")
            page.wait_for_timeout(300)
            page.screenshot(path=str(IMAGES / name))
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
