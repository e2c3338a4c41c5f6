"""The system's Chromium, driven by Playwright, for tests of pages."""

import importlib.util
import shutil

import pytest

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
NEEDED = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="needs Chromium, such as Debian's package `chromium`"),
    pytest.mark.skipif(not importlib.util.find_spec("playwright"), reason="Playwright comes with the group `browser`"),
]
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()
