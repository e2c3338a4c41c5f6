"""Line charts, read back from the SVG, and images and names on pages."""

import base64
import io
import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from imgclf_jax.tools.pages import charts, html, pictures


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.913, 0.957), (-3.0, 1234.0), (0.0, 1e-7), (5.0, 5.5)])
def test_ticks(low, high):
    """Round numbers in equal steps, inside the range; three to ten of them."""
    found = charts.ticks(low, high)
    steps = np.diff(found)
    assert 3 <= len(found) <= 10
    assert low - 1e-12 * high <= found[0] < found[-1] <= high * (1 + 1e-9)
    assert np.allclose(steps, steps[0], rtol=1e-6)
    assert f"{steps[0]:.0e}"[0] in "125"


def test_a_chart_has_its_points():
    """The y axis is logarithmic from a factor of 20 on, and nonfinite values are gaps."""

    def heights(values, linear=False):
        svg = charts.chart("t", "x", [charts.Line("n", 0, list(enumerate(values)))], linear=linear)
        shape = next(path.get("d") for path in ET.fromstring(svg).iter("path") if "line" in path.get("class"))
        return [float(y) for y in re.findall(r"[ML]\S+ (\S+?)(?=[ML]|$)", shape)], shape.count("M")

    (first, second, third), starts = heights([1.0, 2.0, 3.0])
    assert (first - second, starts) == (pytest.approx(second - third, abs=0.11), 1)
    assert first > third
    (first, second, third), _ = heights([1.0, 10.0, 100.0])
    assert first - second == pytest.approx(second - third, abs=0.11)
    (first, second, third), _ = heights([1.0, 10.0, 100.0], linear=True)
    assert 10 * (first - second) == pytest.approx(second - third, abs=1.1)
    found, _ = heights([1e-3, 1e-3 * (1 + 5e-8), 1e-3])
    assert max(found) - min(found) < 0.2  # the rounding of a constant learning rate
    found, starts = heights([1.0, math.nan, 3.0])
    assert (len(found), starts) == (2, 2)
    assert charts.chart("t", "x", [charts.Line("n", 0, [(0, math.nan)])]) == ""
    assert charts.thinned(range(1000))[::299] == [0, 999]  # 300 points, with both ends


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
    assert pictures.fitting("größe, é, 猫", 15)[1] == "gro\\xdfe, e, \\u732b"
    html.write(tmp_path / "a.html", "<p>é\udcff</p>")
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == r"<p>é\udcff</p>"
