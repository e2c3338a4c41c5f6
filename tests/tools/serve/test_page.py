"""The page in a browser: an image is chosen, dropped, pasted and drawn; nothing is asked of other servers."""

import base64

import chromium
import pytest
from chromium import WIDTHS, browser  # noqa: F401  the latter is a fixture
from test_app import model, png, port, serving  # noqa: F401  fixtures

from imgclf_jax.config import default_config
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo
from imgclf_jax.trained import Trained

pytestmark = chromium.NEEDED


@pytest.fixture(params=[(size, scheme) for size in WIDTHS for scheme in ("light", "dark")], ids="-".join)
def page(request, browser, port, tmp_path):  # noqa: F811
    """The open page. At the end there has been no console message, no error, and no request to another server."""
    size, scheme = request.param
    with chromium.opened(browser, size, scheme, f"http://127.0.0.1:{port}/") as (page, said, asked):
        yield page
        page.screenshot(path=tmp_path / f"{size}-{scheme}.png", full_page=True)
    assert [text for text in said if "status of 422" not in text] == []  # which the browser says of a refused image
    assert [url for url in asked if not url.startswith((f"http://127.0.0.1:{port}/", "blob:", "data:"))] == []


def answered(page):
    """Waits for an answer; the class that the page shows first, and what it says."""
    page.get_by_role("status").filter(has_text=" ms in the server").wait_for()
    said = page.text_content("#status")
    page.evaluate("document.getElementById('status').textContent = ''")
    return page.text_content("#classes tbody th"), said


def test_it_classifies_what_it_is_given(page, tmp_path):
    """By each way the same image has the same class; a drawing has one too; what is no image is refused."""
    (tmp_path / "a.png").write_bytes(png(0))
    page.set_input_files("#file", tmp_path / "a.png")
    first, said = answered(page)
    assert said.startswith(f"{first}, in ")
    assert page.locator("#classes tbody tr").count() == 5
    page.click("#explain")
    page.locator("#explanation").wait_for()
    assert page.evaluate("document.getElementById('explanation').decode().then(() => true)")
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
        assert answered(page)[0] == first
    page.locator("#canvas").scroll_into_view_if_needed()
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] - 30, steps=5)
    page.mouse.up()
    drawn = page.evaluate("canvas.getContext('2d').getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data[0]")
    assert drawn == 255
    page.click("#classify")
    assert answered(page)[0]
    (tmp_path / "b.png").write_bytes(b"no image")
    with page.expect_response("**/predict") as response:
        page.set_input_files("#file", tmp_path / "b.png")
    assert response.value.status == 422
    page.get_by_role("status").filter(has_text="in none of the formats").wait_for()


@pytest.mark.parametrize(("loss", "names", "words"), [
    ("mse", ("ink, %", "height"), ["Its values", "2 values: ink, %, height", "target", "value"]),
    ("sigmoid", ("odd", "round"), ["Its labels", "2 labels: odd, round", "label", "probability"]),
])  # fmt: skip
def test_it_shows_numbers_and_several_labels(browser, tmp_path, loss, names, words):  # noqa: F811
    config = default_config()
    config.model, config.loss, config.preprocess = "mlp(widths=(8,))", loss, "decode(1)|resize(8)"
    programs = Programs(Recipe(config, DataInfo(64, (8, 8, 1), names, "-", target_names=names)))
    untrained = Trained(programs, programs.init()["state"], 0)
    (tmp_path / "a.png").write_bytes(png(0))
    with serving(untrained) as where, chromium.opened(browser, "phone", "dark", f"http://127.0.0.1:{where}/") as opened:
        page, said, _ = opened
        page.get_by_text(words[1]).wait_for()
        assert [page.text_content("#result"), *page.locator("#classes thead th").all_text_contents()] == [
            words[0], *words[2:]]  # fmt: skip
        page.set_input_files("#file", tmp_path / "a.png")
        page.get_by_role("status").filter(has_text=" ms in the server").wait_for()
        shown = page.locator("#classes tbody th").all_text_contents()
        found = untrained.describe(untrained.predict([png(0)])[0])
        assert shown == [*found.get("values", ())] + [one["class"] for one in found.get("predictions", ())]
        page.screenshot(path=tmp_path / f"{loss}.png", full_page=True)
        assert said == []


def test_it_can_be_read_by_everyone(page, tmp_path):
    """No fault of accessibility by axe-core, before and after an answer; no scrolling sideways."""
    from axe_core_python.sync_playwright import Axe

    def faults():
        found = Axe().run(page)["violations"]
        return [(fault["id"], [node["html"] for node in fault["nodes"]]) for fault in found]

    assert faults() == []
    (tmp_path / "a.png").write_bytes(png(0))
    page.set_input_files("#file", tmp_path / "a.png")
    answered(page)
    assert faults() == []
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
