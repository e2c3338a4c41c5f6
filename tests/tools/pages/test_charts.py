"""Line charts: ticks, axes and points, read back from the SVG."""

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from imgclf_jax.tools.pages import charts


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
