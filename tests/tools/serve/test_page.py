"""The page in a browser: an image is chosen, dropped, pasted and drawn; nothing is asked of other servers."""

import base64
import re

import chromium
import pytest
from chromium import WIDTHS, browser  # noqa: F401  the latter is a fixture
from test_app import model, png, port, serving, untrained  # noqa: F401  fixtures

from imgclf_jax.run.provenance import DataInfo

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
    table = page.locator("#classes").bounding_box()  # relative to what is in view
    assert 0 <= table["y"] < table["y"] + table["height"] <= page.viewport_size["height"]
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


def test_it_shows_where_a_class_is_found(page, tmp_path):
    """The heatmap lies over the image, at its size and as strong as is wanted; another class has another one."""
    (tmp_path / "a.png").write_bytes(png(0))
    page.set_input_files("#file", tmp_path / "a.png")
    answered(page)
    seen = []
    page.click("#explain")
    for wanted in ("", "3", "8"):
        if wanted:
            page.select_option("#wanted", wanted)
        page.wait_for_function("(seen) => document.getElementById('heat').src && !seen.includes(heat.src)", arg=seen)
        seen.append(page.get_attribute("#heat", "src"))
        boxes = [page.locator(id).bounding_box() for id in ("#preview", "#heat")]
        assert boxes[0] == boxes[1]
        sizes = page.evaluate("[preview, heat].map((image) => [image.naturalWidth, image.naturalHeight])")
        assert sizes[0] == sizes[1] == [28, 28]
    page.locator("#opacity").fill("20")
    assert page.evaluate("getComputedStyle(heat).opacity") == "0.2"


def test_it_takes_several_images(page, tmp_path):
    """Each has its class below its thumbnail, and its numbers when it is chosen; the status names what is no image."""
    files = [tmp_path / f"{seed}.png" for seed in range(6)]
    for seed, file in enumerate(files):
        file.write_bytes(png(seed))
    files[3].write_bytes(b"no image")
    page.set_input_files("#file", files)
    page.get_by_role("status").filter(has_text="5 images in").wait_for()
    assert "1 cannot be classified: 3.png: " in page.text_content("#status")
    shown = page.locator("#strip button").all()
    assert len(shown) == 6
    assert shown[3].is_disabled()
    for button in (shown[5], shown[0]):
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        assert page.text_content("#classes tbody th") == button.text_content()


def test_it_takes_a_photograph(page):
    """By the camera of a desktop, in the page; a phone opens its own."""
    if page.evaluate("matchMedia('(pointer: coarse)').matches"):
        assert page.locator("#photograph").is_visible()
        assert page.locator("#webcam").is_hidden()
        return
    assert page.locator("#photograph").is_hidden()
    page.click("#webcam")
    page.wait_for_function("() => video.videoWidth > 0")
    page.click("#shoot")
    assert answered(page)[0]
    page.click("#stop")
    assert page.locator("#viewfinder").is_hidden()


@pytest.mark.parametrize(("preprocess", "drawn"), [
    ("decode(1)|resize(28)", True), ("decode(3)|resize(28)", False), ("decode(1)|resize(128)", False),
    ("decode(1)|resize(48, 40)", False),  # as of faces
])  # fmt: skip
def test_one_draws_where_images_look_drawn(browser, preprocess, drawn):  # noqa: F811
    """And the page is called as the work directory."""
    channels, height, *width = map(int, re.findall(r"\d+", preprocess))
    shape = height, *(width or [height]), channels
    made = untrained(DataInfo(64, shape, ("a", "b"), "-"), preprocess=preprocess, augment="")
    with (
        serving(made, name="<my birds>") as where,
        chromium.opened(browser, "desktop", "light", f"http://127.0.0.1:{where}/") as (page, said, _),
    ):
        page.get_by_text("2 classes: a, b").wait_for()
        assert page.locator("#drawing").is_visible() == drawn
        assert page.title() == page.text_content("h1") == "<my birds>"
        assert said == []


@pytest.mark.parametrize(("loss", "names", "words"), [
    ("sigmoid", ("odd", "round"), ["Labels", "2 labels: odd, round", "label", "probability"]),
])  # fmt: skip
def test_it_shows_several_labels(browser, tmp_path, loss, names, words):  # noqa: F811
    data = DataInfo(64, (8, 8, 1), names, "-", target_names=names)
    made = untrained(data, loss=loss, preprocess="decode(1)|resize(8)")
    (tmp_path / "a.png").write_bytes(png(0))
    with serving(made) as where, chromium.opened(browser, "phone", "dark", f"http://127.0.0.1:{where}/") as opened:
        page, said, _ = opened
        page.get_by_text(words[1]).wait_for()
        assert [page.text_content("#result"), *page.locator("#classes thead th").all_text_contents()] == [
            words[0], *words[2:]]  # fmt: skip
        page.set_input_files("#file", tmp_path / "a.png")
        page.get_by_role("status").filter(has_text=" ms in the server").wait_for()
        shown = page.locator("#classes tbody th").all_text_contents()
        found = made.describe(made.predict([png(0)])[0])
        assert shown == [*found.get("values", ())] + [one["class"] for one in found.get("predictions", ())]
        page.screenshot(path=tmp_path / f"{loss}.png", full_page=True)
        assert said == []


def test_it_can_be_read_by_everyone(page, tmp_path):
    """No fault of accessibility by axe-core, before and after answers; no scrolling sideways."""
    from axe_core_python.sync_playwright import Axe

    def faults():
        found = Axe().run(page)["violations"]
        wide = page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
        return [(fault["id"], [node["html"] for node in fault["nodes"]]) for fault in found] + ["wide"] * wide

    assert faults() == []
    (tmp_path / "a.png").write_bytes(png(0))
    page.set_input_files("#file", tmp_path / "a.png")
    answered(page)
    page.click("#explain")
    page.locator("#heat").wait_for()
    assert faults() == []
    page.set_input_files("#file", [tmp_path / "a.png"] * 3)
    page.get_by_role("status").filter(has_text="3 images in").wait_for()
    assert faults() == []
