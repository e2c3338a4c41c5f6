"""Images and numbers on pages."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from imgclf_jax.tools.pages import fonts, html, pictures


@pytest.mark.parametrize(("shape", "mode", "size"), [
    ((8, 6, 1), "L", (6, 8)),
    ((200, 400, 3), "RGB", (128, 64)),
    ((128, 5, 4), "RGB", (5, 128)),
    ((3, 3, 2), "L", (3, 3)),
])  # fmt: skip
def test_pictures(shape, mode, size):
    image = np.random.default_rng(0).uniform(size=shape).astype(np.float32)
    tag = pictures.tag(image, "<a>")
    picture = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,(.*?)\"", tag)[1])))
    assert (picture.mode, picture.size) == (mode, size)
    assert 'alt="&lt;a&gt;"' in tag
    assert ('class="small"' in tag) == (max(shape[:2]) < 128)
    if max(shape) < 100:
        assert np.abs(np.asarray(picture) - image[..., 0] * 255).max() <= 0.51


def test_names_of_any_characters(tmp_path):
    """Pictures and pages have them in ASCII or by their codes, never as boxes; no page is lost by them."""
    assert fonts.fitting("größe, é, 猫", 15)[1] == "gro\\xdfe, e, \\u732b"
    html.write(tmp_path / "a.html", "<p>é\udcff</p>")
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == r"<p>é\udcff</p>"
