"""Figures of heatmaps: colors, scale and layout."""

import numpy as np
import pytest

from imgclf_jax.tools.explain import heatmap

BACKGROUND = (255, 255, 255)


def test_the_colors_are_those_of_matplotlibs_viridis():
    colormaps = pytest.importorskip("matplotlib", reason="it comes with the group `peers`").colormaps
    rgb = heatmap.colormap(np.linspace(0, 1, 101)) / 255
    np.testing.assert_allclose(rgb, colormaps["viridis"](np.linspace(0, 1, 101))[:, :3], atol=0.03)


@pytest.mark.parametrize(("at", "shape", "words"), [
    ((0, 0), (3, 3), "the upper left"), ((0, 8), (9, 9), "the upper right"), ((1, 4), (9, 9), "the top"),
    ((3, 0), (7, 7), "the left side"), ((6, 6), (14, 14), "the middle"), ((1, 6), (2, 8), "the lower right"),
])  # fmt: skip
def test_place_in_words(at, shape, words):
    values = np.full(shape, -1.0)
    values[at] = 2.0
    assert heatmap.peak(values, signed=False) == heatmap.peak(values, signed=True) == words
    assert heatmap.peak(np.ones((6, 6)), signed=False) == ""  # nothing stands out


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_the_image_is_beside_the_map_over_it(channels):
    """Pixels of the enlarged image are its own; the hot corner of the map is yellow, the others are violet."""
    image = np.full((8, 12, channels), 100, np.uint8)
    image[2, 3] = 200
    values = np.zeros((2, 2))
    values[1, 1] = 5
    picture = np.asarray(heatmap.draw(image, values, False, ["a title", "of two lines"]))
    same = (picture == 100).all(-1)
    dark = np.flatnonzero(same.sum(1) > 99)  # rows; those of the title have few such pixels
    top, left = dark[0], np.flatnonzero(same.sum(0) > 99)[0]
    assert (picture[top : top + 8 * 32, left : left + 12 * 32].reshape(8, 32, 12, 32, 3)[2, :, 3] == 200).all()
    assert len(dark) == 8 * 32
    right = left + 12 * 32 + 12  # where the map begins
    grey = 0.45 * 100
    np.testing.assert_allclose(picture[top, right], grey + 0.55 * heatmap.COLORS[0], atol=1)
    np.testing.assert_allclose(picture[top + 255, right + 383], grey + 0.55 * heatmap.COLORS[-1], atol=1)
    bar = right + 384 + 12
    np.testing.assert_array_equal(picture[top, bar], heatmap.COLORS[-1])
    np.testing.assert_array_equal(picture[top + 255, bar], heatmap.COLORS[0])
    assert (picture[:top] != BACKGROUND).any()  # the title
