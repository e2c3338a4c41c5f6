"""The page of a run in a browser: accessible, on a desktop and a phone, light and dark."""

import chromium
import pytest
from chromium import WIDTHS, browser  # noqa: F401  the latter is a fixture
from test_report import text, trained  # noqa: F401  fixtures

pytestmark = [*chromium.NEEDED, pytest.mark.usefixtures("one_device")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", list(WIDTHS))
def test_it_can_be_read_by_everyone(browser, trained, text, size, scheme):  # noqa: F811
    """No fault by axe-core with all details open; no horizontal scrolling, message or request; images are shown."""
    from axe_core_python.sync_playwright import Axe

    with chromium.opened(browser, size, scheme, (trained / "report.html").as_uri()) as (page, said, asked):
        page.evaluate("document.querySelectorAll('details').forEach((own) => (own.open = true))")
        found = Axe().run(page)["violations"]
        assert [(fault["id"], [node["html"] for node in fault["nodes"]]) for fault in found] == []
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        sizes = page.evaluate("[...document.images].map((i) => [i.naturalWidth, i.clientWidth, i.clientHeight])")
        assert len(sizes) > 40
        assert all(natural and 40 < shown <= 128 and shown == high for natural, shown, high in sizes)
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [(trained / "report.html").as_uri()]
