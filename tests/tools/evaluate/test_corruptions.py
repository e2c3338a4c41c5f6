"""The common corruptions, held to what the authors' own programs give for the same draws: see `corruption_fixtures`.

Values may differ by one level of 255, where float32 and float64 fall on two sides of a whole number.
"""

import io
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough
from PIL import Image
from scipy import stats

from imgclf_jax.core.errors import UserError
from imgclf_jax.tools.evaluate import corruptions, jpeg

# But frost, which has tests of its own; JPEG and impulse noise, which are held to Pillow and by hand below.
NAMES = [name for name in corruptions.CORRUPTIONS if name not in ("frost", "impulse_noise", "jpeg_compression")]


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
    """(tables, all draws) on the host."""
    tables = corruptions.make_tables(name, severity, images.shape[1:])
    keys = jax.random.split(jax.random.key(severity), len(images))
    draw = jax.vmap(corruptions.CORRUPTIONS[name].draw, (0, 0, None))
    return tables, jax.tree.map(np.asarray, jax.jit(draw)(keys, images, tables))


_jitted = {name: jax.jit(of.apply) for name, of in corruptions.CORRUPTIONS.items()}


def write_draws(path):
    """For `corruption_fixtures`: the images and the draws."""
    out = {f"image{side}": pictures(1, side)[0] for side in (32, 224)}
    for side in (32, 224):
        for name in NAMES:
            for severity in corruptions.SEVERITIES:
                for i, draws in enumerate(
                    jax.tree.leaves(drawn(name, pictures(1, side), severity)[1]) or [np.zeros(1)]
                ):
                    out[f"{side}/{name}/{severity}/{i}"] = draws[0]
    np.savez_compressed(path, **out)


@pytest.fixture(scope="module")
def by_the_authors():
    with np.load(Path(__file__).with_name("fixtures") / "corruptions.npz") as file:
        yield file


# The mean over a disk of n pixels is a whole level once in n, here 5 and 29. The authors' ends just below it.
WHOLE_LEVELS = {"32/defocus_blur/4": 0.15, "224/defocus_blur/1": 0.04}


def check(found, wanted, case):
    """At most one level apart, and nearly everywhere equal."""
    assert found.dtype == np.uint8
    difference = np.abs(found.astype(int) - wanted)
    assert difference.max() <= 1
    assert (difference > 0).mean() < WHOLE_LEVELS.get(case, 0.02)


@pytest.mark.parametrize("severity", [5, *thorough(1, 2, 3, 4)])
@pytest.mark.parametrize("name", NAMES)
def test_small_images_are_those_of_cifar_10_c(by_the_authors, name, severity):
    images = pictures(1, 32)
    found = np.asarray(_jitted[name](images, *drawn(name, images, severity)))[0]
    check(found, by_the_authors[case := f"32/{name}/{severity}"], case)


@pytest.mark.slow
@pytest.mark.parametrize("severity", corruptions.SEVERITIES)
@pytest.mark.parametrize("name", NAMES)
def test_large_images_are_those_of_imagenet_c(by_the_authors, name, severity):
    """Two rows of each."""
    images = pictures(1, 224)
    found = np.asarray(_jitted[name](images, *drawn(name, images, severity)))[0, 56::112]
    check(found, by_the_authors[case := f"224/{name}/{severity}"], case)


@pytest.mark.parametrize("small", [True, *thorough(False)])
def test_impulse_noise_makes_a_share_of_the_values_black_or_white(small):
    """The programs call scikit-image, whose draws cannot be injected; the fractions are those of the paper."""
    images = pictures(1, 32 if small else 224)
    for severity, share in zip(corruptions.SEVERITIES, (1, 2, 3, 5, 7) if small else (3, 6, 9, 17, 27), strict=True):
        found = np.asarray(_jitted["impulse_noise"](images, *drawn("impulse_noise", images, severity)))
        new = found != images
        assert set(np.unique(found[new])) == {0, 255}
        assert abs(new.mean() - share / 100) < 4 * np.sqrt(share / 100 / images.size) + 0.01
        assert abs((found[new] == 255).mean() - 0.5) < 3 / np.sqrt(new.sum())


@pytest.mark.parametrize("name", ["defocus_blur", "glass_blur", "brightness", "pixelate"])
def test_grey_images_are_color_images_of_equal_channels(name):
    grey = pictures(1, 32, channels=1)
    tables, draws = drawn(name, grey, 3)
    color = np.repeat(grey, 3, -1)
    found, wanted = (np.asarray(_jitted[name](images, tables, draws)) for images in (grey, color))
    np.testing.assert_array_equal(found[..., 0], wanted[..., 0])


@pytest.mark.thorough
def test_draws():
    """Each random field has the published distribution."""
    images = pictures(8, 32)
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
    for field in (x / 2 + 0.5 for x in drawn("elastic_transform", images, 1)[1]):
        assert stats.kstest(field.ravel(), "uniform").pvalue > 1e-3
    moves = drawn("glass_blur", pictures(8, 96), 4)[1]
    assert stats.chisquare(np.bincount(moves.ravel() + 3)).pvalue > 1e-3  # -3 to 2
    assert (moves.min(), moves.max()) == (-3, 2)


@pytest.mark.thorough
def test_the_shorter_side_of_a_wide_image_chooses_the_constants():
    rows = corruptions.make_tables("zoom_blur", 5, (24, 40, 3))
    assert (rows["rows"].shape[1], rows["columns"].shape[1]) == (24, 40)
    for name in ("defocus_blur", "glass_blur", "fog", "pixelate", "elastic_transform"):
        images = pictures(1, 40, height=24)
        assert _jitted[name](images, *drawn(name, images, 3)).shape == images.shape
    assert corruptions.make_tables("contrast", 1, (84, 300, 3))["c"] == np.float32(0.75)
    assert corruptions.make_tables("contrast", 1, (85, 300, 3))["c"] == np.float32(0.4)


_jpeg = jax.jit(jpeg.jpeg)


@pytest.mark.parametrize(
    "shape", [(8, 8, 1), (33, 45, 3), pytest.param((32, 32, 3), marks=pytest.mark.thorough)], ids=str
)
def test_jpeg(shape):
    """Pillow's bytes, written and read, bit for bit, with sizes that are not multiples of a block."""
    images = pictures(2, shape[1], shape[2], height=shape[0])
    for quality in (80, 65, 58, 50, 40, 25, 18, 15, 10, 7):
        found = np.asarray(_jpeg(images, jpeg.quantization_tables(quality)))
        for image, got in zip(images, found, strict=True):
            file = io.BytesIO()
            Image.fromarray(image.squeeze()).save(file, "JPEG", quality=quality)
            np.testing.assert_array_equal(got, np.asarray(Image.open(file)).reshape(shape))
    for small, qualities in ((True, (80, 65, 58, 50, 40)), (False, (25, 18, 15, 10, 7))):
        assert corruptions.CORRUPTIONS["jpeg_compression"].constants[small] == qualities


def test_pixelate():
    """Pillow's BOX filter, bit for bit; at this size the centers of some pixels are on the edges of boxes."""
    images = pictures(1, 96, height=103)
    found = np.asarray(_jitted["pixelate"](images, *drawn("pixelate", images, 4)))
    small = Image.fromarray(images[0]).resize((int(96 * 0.3), int(103 * 0.3)), Image.Resampling.BOX)
    np.testing.assert_array_equal(found[0], small.resize((96, 103), Image.Resampling.BOX))


def test_what_an_example_gets_depends_on_its_place_and_not_on_its_batch():
    """And on the seed and the severity; `corrupt` returns the same for other programs."""
    images = np.broadcast_to(pictures(1, 16), (6, 16, 16, 3))
    run = jax.jit(corruptions.apply, static_argnums=0)
    tables, key = corruptions.make_tables("snow", 5, images.shape[1:]), corruptions.make_key("snow", 5, 0)
    places = np.arange(6, dtype=np.int32)
    whole = np.asarray(run("snow", images, tables, key, places))
    parts = [np.asarray(run("snow", images[:3], tables, key, places[part])) for part in (slice(3), slice(3, 6))]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert len({image.tobytes() for image in whole}) == 6
    for other in (("snow", 5, 1), ("snow", 4, 0), ("fog", 5, 0)):
        changed = run("snow", images[:3], tables, corruptions.make_key(*other), places[:3])
        assert (np.asarray(changed) != whole[:3]).any()
    own = corruptions.corrupt("contrast", images, 5, places)
    wanted = _jitted["contrast"](images, corruptions.make_tables("contrast", 5, images.shape[1:]), ())
    np.testing.assert_array_equal(own, wanted)


def test_wrong_names_severities_and_channels_are_told():
    for name, severity, channels, said in (
        ("fogg", 5, 3, "unknown corruption 'fogg': did you mean 'fog'"), ("fog", 6, 3, "severity=6: must be 1 to 5"),
        ("fog", 5, 4, "these have 4 channels"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            corruptions.corrupt(name, jnp.zeros((1, 16, 16, channels), jnp.uint8), severity, jnp.arange(1))


@pytest.mark.parametrize(("name", "shape", "said"), [
    ("elastic_transform", (2, 9, 1), "elastic_transform needs at least 3 pixels a side, but these images have 2 x 9"),
    ("elastic_transform", (9, 1, 3), "elastic_transform needs at least 3 pixels a side, but these images have 9 x 1"),
    ("fog", (1, 1, 1), "fog needs at least 2 pixels on one side, but these images have 1 x 1"),
])  # fmt: skip
def test_images_that_are_too_small_are_told(name, shape, said):
    """They were black, and counted as corrupted: the published formulas divide zero by zero."""
    with pytest.raises(UserError, match=said):
        corruptions.make_tables(name, 1, shape)


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "shape"), [("elastic_transform", (3, 4, 1)), ("fog", (1, 2, 1))])
def test_the_smallest_images_are_not_black(name, shape):
    images = jnp.full((4, *shape), 200, jnp.uint8)
    assert np.asarray(corruptions.corrupt(name, images, 1, jnp.arange(4))).max() > 100


def test_all_fifteen():
    """Those of the paper, in its order."""
    paper = """gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost fog
               brightness contrast elastic_transform pixelate jpeg_compression""".split()  # noqa: SIM905
    assert paper == list(corruptions.CORRUPTIONS)


if __name__ == "__main__":
    write_draws(sys.argv[1])
