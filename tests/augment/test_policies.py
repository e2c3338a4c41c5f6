"""Augmentation policies: every op, sign and magnitude against Pillow, the random draws, and the accepted images."""

from collections import Counter

import jax
import numpy as np
import pytest
from cases import thorough
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats
from test_photometric import ENHANCE, by_colorsys, photos, picture

from imgclf_jax.augment import policies

KEY = jax.random.key(11)


def affine(image, matrix, fill=0):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=fill)


def by_pillow(image, op, magnitude, top, fill=0):
    """One op as torchvision's policies define it, written from their text; `magnitude` signed, out of 30; `top` the
    greatest strengths: shear, translation in pixels (x, y), degrees, factor, bits."""
    part = magnitude / 30
    shear, (x, y), degrees, factor, bits = top
    if op in ENHANCE:
        return ENHANCE[op](image).enhance(1 + part * factor)
    return {
        "identity": lambda: image,
        "shear_x": lambda: affine(image, (1, part * shear, 0, 0, 1, 0), fill),
        "shear_y": lambda: affine(image, (1, 0, 0, part * shear, 1, 0), fill),
        "translate_x": lambda: affine(image, (1, 0, int(part * x), 0, 1, 0), fill),
        "translate_y": lambda: affine(image, (1, 0, 0, 0, 1, int(part * y)), fill),
        "rotate": lambda: image.rotate(part * degrees, fillcolor=fill),
        "posterize": lambda: ImageOps.posterize(image, 8 - round(abs(part) * bits)),
        "solarize": lambda: ImageOps.solarize(image, 256 - 256 * abs(part)),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
    }[op]()


def wide(h, w):
    return policies.Ranges(0.99, 32.0, 32.0, 135.0, 0.99, 6), (0.99, (32, 32), 135, 0.99, 6)


def narrow(h, w):
    x, y = 150 / 331 * w, 150 / 331 * h
    return policies.Ranges(0.3, x, y, 30.0, 0.9, 4), (0.3, (x, y), 30, 0.9, 4)


IMAGES = {"colour": photos(32), "oblong": photos(40)[:, 3:26], "grey": photos(24)[..., 1:2]}
APPLY = jax.jit(lambda x, op, fill, *drawn: policies.apply(x, op, policies.Strengths(*drawn), fill))


def everything(ranges, image, fill=0):
    """[(op, signed magnitude, image)] for all ops, signs and magnitudes."""
    table = policies.strengths(ranges, *image.shape[:2])
    place = tuple(v.ravel() for v in np.meshgrid(np.arange(14), [0, 1], np.arange(31), indexing="ij"))
    fill = np.broadcast_to(np.asarray(fill, np.uint8), image.shape[-1:])
    out = np.asarray(APPLY(np.stack([image] * 868), place[0], fill, *(np.asarray(v)[place] for v in table)))
    return [(policies.OPS[op], (1 - 2 * sign) * m, own) for op, sign, m, own in zip(*place, out, strict=True)]


@pytest.mark.parametrize("space", [narrow, wide])
@pytest.mark.parametrize("kind", [*list(IMAGES)[:1], *thorough(*list(IMAGES)[1:])])
def test_every_op_is_pillows_at_every_magnitude(space, kind):
    """Bit for bit, except autocontrast, where Pillow may be a level lower."""
    image = IMAGES[kind][3]
    h, w, c = image.shape
    ranges, top = space(h, w)
    fill = (10, 128, 255)[:c] if c == 3 else 77
    for op, magnitude, own in everything(ranges, image, fill):
        expected = np.asarray(by_pillow(picture(image), op, magnitude, top, fill)).reshape(h, w, c)
        difference = own.astype(int) - expected
        lowest = 1 if op == "autocontrast" else 0
        assert set(np.unique(difference)) <= {0, lowest}, (op, magnitude)


def drawn(apply, n, images):
    """How often each (op, sign, magnitude) was drawn, recognized by its output, among outputs that differ."""
    out = np.asarray(jax.jit(apply)(KEY, np.broadcast_to(images, (n, *images.shape))))
    return Counter(image.tobytes() for image in out)


@pytest.mark.thorough
def test_trivialaugment_draws_every_op_sign_and_magnitude_alike():
    """The share of each outcome follows the number of draws that lead to it."""
    image = photos(16)[0]
    shares = Counter(out.tobytes() for _, _, out in everything(wide(16, 16)[0], image))
    n = 15_000
    counts = drawn(policies.trivialaugment, n, image)
    assert set(counts) <= set(shares)
    expected = np.array([shares[k] / 868 * n for k in shares])
    observed = np.array([counts[k] for k in shares])
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_randaugment_draws_the_ops_of_its_magnitude():
    """On an oblong image, where translations differ by axis; whose ops are Pillow's, see above."""
    image = IMAGES["oblong"][3]
    table = everything(narrow(*image.shape[:2])[0], image)
    counts = drawn(lambda key, x: policies.randaugment(key, x, 1, 30), 60, image)
    assert counts.keys() <= {own.tobytes() for _, magnitude, own in table if abs(magnitude) == 30}
    assert len(counts) > 10


@pytest.mark.thorough
def test_magnitude_std_spreads_the_magnitude():
    """A solarized ramp reveals the magnitude: the normal draw, rounded and clipped to 0 to 30."""
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    _, top = narrow(16, 16)
    solarized = {m: np.asarray(by_pillow(picture(image), "solarize", m, top)).tobytes() for m in range(31)}
    assert len(set(solarized.values())) == 31
    counts = drawn(lambda key, x: policies.randaugment(key, x, 1, 9, magnitude_std=2.0), 15_000, image)
    seen = {m: counts.get(solarized[m], 0) for m in (6, 7, 8, 9, 10, 11, 12)}
    inside = np.array([stats.norm.cdf((m + 0.5 - 9) / 2) - stats.norm.cdf((m - 0.5 - 9) / 2) for m in seen])
    assert stats.chisquare(list(seen.values()), inside / inside.sum() * sum(seen.values())).pvalue > 1e-3
    assert sum(seen.values()) > 800


def test_color_jitter_is_its_ops_in_order():
    images = photos(16)
    out = jax.jit(lambda x: policies.color_jitter(KEY, x, 0.4, (0.2, 3.0), 0.9, 0.3))(images)
    ranges = [(0.6, 1.4), (0.2, 3.0), (0.1, 1.9), (-0.3, 0.3)]
    values = [
        np.asarray(jax.random.uniform(jax.random.fold_in(KEY, i), (5,), minval=low, maxval=high))
        for i, (low, high) in enumerate(ranges)
    ]
    for image, own, *factors in zip(images, np.asarray(out), *values, strict=True):
        p = picture(image)
        ops = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for op, factor in zip(ops, factors, strict=False):
            p = op(p).enhance(float(factor))
        assert np.abs(own - by_colorsys(np.asarray(p), float(factors[3]))).max() <= 0.5 + 1e-3
