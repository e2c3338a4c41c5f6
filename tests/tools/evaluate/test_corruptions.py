"""The common corruptions, held to their published definitions in `corruption_definitions`.

Both sides get the same draws. Values may differ by one level of 255, where float32 and float64 fall on two sides of a
whole number, unless a test says otherwise.
"""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough
from corruption_definitions import (
    DEFINITIONS,
    brightness,
    contrast,
    defocus_blur,
    fog,
    glass_blur,
    pixelate,
    snow,
    zoom_blur,
)
from PIL import Image
from scipy import stats

from imgclf_jax.core.errors import UserError
from imgclf_jax.tools.evaluate import corruptions, jpeg

SMALL, LARGE = 32, 224


def pictures(n: int, side: int, channels: int = 3, height: int = 0) -> np.ndarray:
    """Smooth color waves with hard edges, noise, black and white in them: uint8[n, height, side, channels]."""
    random = np.random.default_rng(side + channels)
    h = height or side
    y, x = np.mgrid[:h, :side] / side
    out = np.empty((n, h, side, channels))
    for i in range(n):
        for c in range(channels):
            a, b, p = random.uniform(1, 9, 3)
            out[i, ..., c] = 128 + 100 * np.sin(a * x + p) * np.cos(b * y)
        out[i, h // 4 : h // 2, side // 3 : side // 2] = random.integers(0, 256, channels)
    out += random.normal(0, 8, out.shape)
    out[:, -3:, -4:], out[:, :2, :2] = 255, 0
    return np.clip(out, 0, 255).astype(np.uint8)


def drawn(name, images, severity):
    """(tables, draws of all) on the host."""
    tables = corruptions.tables_of(name, severity, images.shape[1:])
    keys = jax.random.split(jax.random.key(severity), len(images))
    draw = jax.vmap(corruptions.CORRUPTIONS[name].draw, (0, 0, None))
    return tables, jax.tree.map(np.asarray, jax.jit(draw)(keys, images, tables))


_jitted = {name: jax.jit(of.apply) for name, of in corruptions.CORRUPTIONS.items()}


def check(definition, images, severity):
    """Holds the op to its definition: nowhere more than a level apart, and nearly everywhere equal."""
    name = definition.__name__
    tables, draws = drawn(name, images, severity)
    found = np.asarray(_jitted[name](images, tables, draws))
    constant = DEFINITIONS[definition][min(images.shape[1:3]) < 85][severity - 1]
    wanted = np.stack([
        definition(image / 255, constant, jax.tree.map(lambda x, i=i: x[i], draws)) for i, image in enumerate(images)
    ])  # fmt: skip
    assert found.dtype == np.uint8
    assert found.shape == images.shape
    difference = np.abs(found.astype(int) - wanted)
    assert difference.max() <= 1
    # Of a disk of five pixels every fifth mean is a whole level, and a blur with weights of 1e-6 decides on its side.
    assert (difference > 0).mean() < (0.15 if constant == (1, 0.2) else 0.02)
    assert (found != images).mean() > 0.005 or name in ("defocus_blur", "glass_blur")  # which do nothing at first


@pytest.mark.parametrize("severity", [1, 5, *thorough(2, 3, 4)])
@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda function: function.__name__)
def test_small(definition, severity):
    """CIFAR-10-C's constants, color images; all severities are one program."""
    check(definition, pictures(2, SMALL), severity)


@pytest.mark.slow
@pytest.mark.parametrize("severity", corruptions.SEVERITIES)
@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda function: function.__name__)
def test_large(definition, severity):
    """ImageNet-C's constants."""
    check(definition, pictures(1, LARGE), severity)


@pytest.mark.parametrize("definition", [defocus_blur, snow, brightness, pixelate], ids=lambda d: d.__name__)
def test_grey(definition):
    """Grey images, one channel, as color images of equal channels."""
    check(definition, pictures(1, SMALL, channels=1), 3)


def test_grey_glass_blur():
    """Of one channel a view is a view as well."""
    check(glass_blur, pictures(1, SMALL, channels=1), 5)


def test_draws():
    """Each random field has the published law."""
    images = pictures(8, SMALL)
    for name, severity, law in (
        ("gaussian_noise", 1, stats.norm()),
        ("shot_noise", 1, stats.uniform()),
        ("motion_blur", 2, stats.uniform(-45, 90)),
        ("fog", 1, stats.uniform(-1, 2)),
    ):
        assert stats.kstest(drawn(name, images, severity)[1].ravel(), law.cdf).pvalue > 1e-3
    flakes, angles = drawn("snow", images, 1)[1]
    assert stats.kstest(flakes.ravel(), "norm").pvalue > 1e-3
    assert stats.kstest(angles, stats.uniform(-135, 90).cdf).pvalue > 1e-3
    for field in (
        *drawn("impulse_noise", images, 1)[1],
        *(x / 2 + 0.5 for x in drawn("elastic_transform", images, 1)[1]),
    ):
        assert stats.kstest(field.ravel(), "uniform").pvalue > 1e-3
    moves = drawn("glass_blur", pictures(8, 96), 4)[1]
    assert stats.chisquare(np.bincount(moves.ravel() + 3)).pvalue > 1e-3  # -3 to 2
    assert moves.min() == -3
    assert moves.max() == 2


def test_a_wide_image():
    """Each side by its own length; the shorter one chooses the constants."""
    images = pictures(1, 40, height=24)
    for definition in (defocus_blur, glass_blur, fog, pixelate):
        check(definition, images, 3)
    rows = corruptions.tables_of("zoom_blur", 5, (24, 40, 3))
    assert rows["rows"].shape[1] == 24
    assert rows["columns"].shape[1] == 40
    assert corruptions.tables_of("contrast", 1, (84, 300, 3))["c"] == np.float32(0.75)
    assert corruptions.tables_of("contrast", 1, (85, 300, 3))["c"] == np.float32(0.4)


@pytest.mark.parametrize("shape", [(32, 32, 3), (32, 32, 1), (8, 8, 1), (33, 45, 3), (17, 30, 3)], ids=str)
def test_jpeg(shape):
    """Pillow's bytes, written and read, bit for bit, sizes that are no multiples of a block among them."""
    images = pictures(2, shape[1], shape[2], height=shape[0])
    for quality in (80, 65, 58, 50, 40, 25, 18, 15, 10, 7):
        found = np.asarray(_jpeg(images, jpeg.tables(quality)))
        for image, got in zip(images, found, strict=True):
            file = io.BytesIO()
            Image.fromarray(image.squeeze()).save(file, "JPEG", quality=quality)
            np.testing.assert_array_equal(got, np.asarray(Image.open(file)).reshape(shape))
    for small, qualities in ((True, (80, 65, 58, 50, 40)), (False, (25, 18, 15, 10, 7))):
        assert corruptions.CORRUPTIONS["jpeg_compression"].constants[small] == qualities


_jpeg = jax.jit(jpeg.jpeg)


@pytest.mark.parametrize("name", ["shot_noise", "snow"])
def test_keyed_by_the_place(name):
    """What an example gets depends on its place, the seed and the severity, not on the batch that it is in."""
    images = np.broadcast_to(pictures(1, 16), (6, 16, 16, 3))
    run = jax.jit(corruptions.with_tables, static_argnums=0)
    tables = corruptions.tables_of(name, 5, images.shape[1:])
    key = corruptions.key_of(name, 5, 0)
    places = np.arange(6, dtype=np.int32)
    whole = np.asarray(run(name, images, tables, key, places))
    parts = [np.asarray(run(name, images[:3], tables, key, places[part])) for part in (slice(3), slice(3, 6))]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert len({image.tobytes() for image in whole}) == 6
    others = [corruptions.key_of(name, 5, 1), corruptions.key_of(name, 4, 0), corruptions.key_of("fog", 5, 0)]
    for other in others:
        assert (np.asarray(run(name, images[:3], tables, other, places[:3])) != whole[:3]).any()


def test_corrupt():
    """The function for one's own programs."""
    images = jnp.asarray(pictures(2, 16))
    out = corruptions.corrupt("contrast", images, 5, jnp.arange(2, dtype=jnp.int32))
    np.testing.assert_allclose(out, np.stack([contrast(x / 255, 0.15, None) for x in np.asarray(images)]), atol=1)
    out = corruptions.corrupt("zoom_blur", images, 3, jnp.arange(2, dtype=jnp.int32))  # a loop over its tables
    wanted = np.stack([zoom_blur(x / 255, (1, 1.16, 0.01), None) for x in np.asarray(images)])
    np.testing.assert_allclose(out, wanted, atol=1)
    with pytest.raises(UserError, match=r"unknown corruption 'fogg': did you mean 'fog'"):
        corruptions.corrupt("fogg", images, 5, jnp.arange(2, dtype=jnp.int32))
    with pytest.raises(UserError, match="severity=6: wants 1 to 5"):
        corruptions.corrupt("fog", images, 6, jnp.arange(2, dtype=jnp.int32))
    with pytest.raises(UserError, match="these have 4 channels"):
        corruptions.tables_of("fog", 5, (16, 16, 4))


def test_all_fifteen():
    """Those of the paper, in its order."""
    paper = """gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost fog
               brightness contrast elastic_transform pixelate jpeg_compression""".split()  # noqa: SIM905
    assert paper == list(corruptions.CORRUPTIONS)
