"""Chromium, what it is started with, and what tests read from a page in it.

CHROMIUM names the browser; Debian's is looked for without it.
"""

import os
import shutil

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


def number(text):
    """A number as pages write it."""
    return float(text.replace("−", "-").replace(",", "").replace("+", ""))


def facts(page, box):
    """The terms of a list of facts, with their values."""
    names, values = page.locator(f"{box} dt"), page.locator(f"{box} dd")
    return dict(zip(names.all_inner_texts(), values.all_inner_texts(), strict=True))


def fits(page):
    """Whether nothing is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")
