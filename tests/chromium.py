"""The system's Chromium, driven by Playwright, for tests of pages."""

import contextlib
import importlib.util
import shutil

import pytest

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
NEEDED = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="needs Chromium, such as Debian's package `chromium`"),
    pytest.mark.skipif(not importlib.util.find_spec("playwright"), reason="Playwright comes with the group `browser`"),
]
CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # a test picture, without a question
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", *CAMERA])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, size, scheme, url):
    """(the page at `url`, what the browser says, what it asks for): on a "desktop" or a "phone", "light" or "dark"."""
    width, height = WIDTHS[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme,
                                  has_touch=size == "phone", is_mobile=size == "phone")  # fmt: skip
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    yield page, said, asked
    context.close()
