"""The common corruptions, held to the authors' programs, to Pillow and to their published distributions.

`fixtures/corruptions.npz` has what `make_cifar_c.py` and `make_imagenet_c.py` of github.com/hendrycks/robustness return
for the pictures of this file: whole images of 32 pixels, two rows of those of 224.
"""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from imgclf_jax.core.errors import UserError
from imgclf_jax.tools.evaluate.corruptions import CORRUPTIONS, SEVERITIES, corrupt


def picture(side: int, channels: int = 3, height: int = 0) -> np.ndarray:
    """Smooth color waves with hard edges, noise, black and white in them: uint8[height, side, channels]."""
    random = np.random.default_rng(side + channels)
    h = height or side
    y, x = np.mgrid[:h, :side] / side
    out = np.empty((h, side, channels))
    for c in range(channels):
        a, b, p = random.uniform(1, 9, 3)
        out[..., c] = 128 + 100 * np.sin(a * x + p) * np.cos(b * y)
    out[h // 4 : h // 2, side // 3 : side // 2] = random.integers(0, 256, channels)
    out += random.normal(0, 8, out.shape)
    out[-3:, -4:], out[:2, :2] = 255, 0
    return np.clip(out, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", ["brightness", "contrast", "pixelate"])
@pytest.mark.parametrize("side", [32, 224])
def test_the_authors_programs(side, name, severity):
    """At most one level apart, where a value is close to a whole one, and nearly everywhere equal."""
    with np.load(Path(__file__).with_name("fixtures") / "corruptions.npz") as file:
        wanted = file[f"{side}/{name}/{severity}"]
    found = corrupt(name, severity, picture(side), 0)
    assert found.dtype == np.uint8
    difference = np.abs((found if side == 32 else found[56::112]).astype(int) - wanted)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.04


@pytest.mark.parametrize("shape", [(8, 8, 1), (33, 45, 3), (90, 90, 3)], ids=str)
def test_jpeg_is_that_of_pillow(shape):
    image = picture(shape[1], shape[2], height=shape[0])
    for severity, quality in zip(
        SEVERITIES, (25, 18, 15, 10, 7) if shape[0] > 84 else (80, 65, 58, 50, 40), strict=True
    ):
        file = io.BytesIO()
        Image.fromarray(image.squeeze()).save(file, "JPEG", quality=quality)
        found = corrupt("jpeg_compression", severity, image, 0)
        np.testing.assert_array_equal(found, np.asarray(Image.open(file)).reshape(shape))


@pytest.mark.parametrize(("side", "stds"), [(64, (0.04, 0.06, 0.08, 0.09, 0.10)), (96, (0.08, 0.12, 0.18, 0.26, 0.38))])
def test_noise_is_normal(side, stds):
    for severity, std in zip(SEVERITIES, stds, strict=True):
        found = corrupt("gaussian_noise", severity, np.full((side, side, 3), 128, np.uint8), 7)
        inner = found[(found > 0) & (found < 255)]
        inner = inner + np.random.default_rng(0).random(inner.size)
        law = stats.norm(128, std * 255)
        share = law.cdf(255) - law.cdf(1)
        assert stats.kstest(inner, lambda x, law=law, share=share: (law.cdf(x) - law.cdf(1)) / share).pvalue > 1e-3


def test_noise_depends_on_the_position():
    one, again, other = (corrupt("gaussian_noise", 5, picture(16), i) for i in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_gray_images_keep_their_shape_and_others_are_refused(name):
    assert corrupt(name, 5, np.full((1, 300, 1), 200, np.uint8), 0).shape == (1, 300, 1)
    with pytest.raises(UserError, match="these have 4 channels"):
        corrupt(name, 1, np.zeros((8, 8, 4), np.uint8), 0)
