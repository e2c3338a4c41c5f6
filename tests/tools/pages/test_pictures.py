"""Images and numbers on pages."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from imgclf_jax.tools.pages import pictures


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


def test_a_picture_of_few_colors_is_smaller_and_nearly_the_same():
    """No pixel is far off, not even one of a unique color."""
    y, x = np.mgrid[:64, :64] / 63
    image = np.stack([y, x, (x + y) / 2], -1) + np.random.default_rng(0).normal(0, 0.02, (64, 64, 3))
    image[5, 7] = (1, 1, 0)
    small, large = (pictures.tag(image, "a", colors) for colors in (64, 0))
    assert len(small) < len(large) / 2
    picture = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,(.*?)\"", small)[1])))
    assert len(picture.getcolors()) <= 64
    assert np.abs(np.asarray(picture.convert("RGB")) - np.clip(image, 0, 1) * 255).max() < 40
