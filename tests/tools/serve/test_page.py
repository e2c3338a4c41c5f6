"""The page in a browser: an image is chosen, dropped, pasted and drawn; nothing is asked of other servers."""

import base64

import chromium
import pytest
from chromium import WIDTHS, browser  # noqa: F401  the latter is a fixture
from test_app import model, png  # noqa: F401  the former is a fixture
from test_limits import in_thread

from imgclf_jax.tools.serve import app

pytestmark = chromium.NEEDED


@pytest.fixture(scope="module")
def port(model):  # noqa: F811
    with in_thread(app.build(model)) as port:
        yield port


@pytest.fixture(params=[(size, scheme) for size in WIDTHS for scheme in ("light", "dark")], ids="-".join)
def page(request, browser, port):  # noqa: F811
    """The open page. At the end there has been no console message, no error, and no request to another server."""
    size, scheme = request.param
    with chromium.opened(browser, size, scheme, f"http://127.0.0.1:{port}/") as (page, said, asked):
        yield page
    assert [text for text in said if "status of 422" not in text] == []  # which the browser says of a refused image
    assert [url for url in asked if not url.startswith((f"http://127.0.0.1:{port}/", "blob:", "data:"))] == []


def answered(page, number=1):
    """Waits for the answers to so many images; the classes that the page shows first."""
    page.get_by_role("status").filter(has_text=f"{number} image").wait_for()
    page.evaluate("document.getElementById('status').textContent = ''")
    return [article.locator("tbody th").first.text_content() for article in page.locator("article:has(table)").all()]


def test_it_classifies_what_it_is_given(page, tmp_path):
    """By each way the same image has the same class; a drawing has one too; what is no image is refused."""
    (tmp_path / "a.png").write_bytes(png(0))
    page.set_input_files("#file", tmp_path / "a.png")
    first = answered(page)
    assert page.locator("article tbody tr").count() == 5
    for event, carrier in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.evaluate(
            """([event, carrier, content]) => {
                const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
                const data = new DataTransfer();
                data.items.add(new File([bytes], "a.png", { type: "image/png" }));
                const options = { [carrier]: data, bubbles: true, cancelable: true };
                const made = event === "drop" ? new DragEvent(event, options) : new ClipboardEvent(event, options);
                document.getElementById("drop").dispatchEvent(made);
            }""",
            [event, carrier, base64.b64encode(png(0)).decode()],
        )
        assert answered(page) == first
    page.locator("#canvas").scroll_into_view_if_needed()
    page.click("#classify")  # nothing
    page.get_by_role("status").filter(has_text="The drawing is empty").wait_for()
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] - 30, steps=5)
    page.mouse.up()
    drawn = page.evaluate("canvas.getContext('2d').getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data[0]")
    assert drawn == 255
    page.click("#classify")
    assert len(answered(page)) == 1
    for seed in range(3):
        (tmp_path / f"{seed}.png").write_bytes(png(seed) if seed else b"no image")
    page.set_input_files("#file", [tmp_path / f"{seed}.png" for seed in range(3)])
    assert len(answered(page, 3)) == 2
    assert "0.png: the image is in none of the formats" in page.text_content("article .error")
    page.set_input_files("#file", [tmp_path / "0.png"] * 2)
    page.get_by_role("status").filter(has_text="2 images").filter(has_text="2 failed").wait_for()
    page.evaluate("name => { document.querySelector('article').replaceChildren(); "
                  "show(document.querySelector('article'), new File([], name), [{class: name, probability: 0.5}]) }",
                  "Sonnenblume")  # fmt: skip
    name = page.locator("article th").bounding_box()
    assert name["height"] < 40  # one line


def test_it_shows_where_a_class_is_found(page, tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    page.set_input_files("#file", tmp_path / "a.png")
    answered(page)
    page.get_by_role("button", name="Show where").click()
    page.wait_for_function("() => document.querySelector('.heatmap').naturalWidth > 2 * 28")
    seen = page.get_attribute(".heatmap", "src")
    page.select_option("article select", "3")
    page.wait_for_function("(seen) => document.querySelector('.heatmap').src !== seen", arg=seen)
    assert page.get_attribute(".heatmap", "alt") == "Where a.png speaks for 3"


def test_it_can_be_read_by_everyone(page, tmp_path):
    """No fault of accessibility by axe-core, before and after answers; no scrolling sideways."""
    from axe_core_python.sync_playwright import Axe

    def faults():
        found = Axe().run(page)["violations"]
        wide = page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
        return [(fault["id"], [node["html"] for node in fault["nodes"]]) for fault in found] + ["wide"] * wide

    page.get_by_text("10 classes").wait_for()
    assert faults() == []
    (tmp_path / "a.png").write_bytes(png(0))
    page.set_input_files("#file", [tmp_path / "a.png"] * 3)
    answered(page, 3)
    page.get_by_role("button", name="Show where").first.click()
    page.wait_for_function("() => document.querySelector('.heatmap').naturalWidth > 2 * 28")
    assert faults() == []
