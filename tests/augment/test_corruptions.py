"""The common corruptions, held to their published definitions: slow direct computations by NumPy, SciPy and Pillow.

Both sides get the same draws. Values may differ by one level of 255, where float32 and float64 fall on two sides of a
whole number, unless a test says otherwise.
"""

import colorsys
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from imgclf_jax.augment import corruptions, jpeg
from imgclf_jax.core.errors import UserError

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


def truncated(values: np.ndarray) -> np.ndarray:
    """As np.uint8 does, what is within 1e-9 of a whole level being that level."""
    return np.floor(np.clip(values, 0, 1) * 255 + 1e-9).astype(np.uint8)


# The definitions, one image f64[h, w, c] from 0 to 1 at a time, the constants typed once more.


def gaussian_noise(x, c, noise):
    return truncated(x + c * noise)


def impulse_noise(x, c, draws):
    hit, salt = draws
    out = x.copy()
    out[(hit <= c) & (salt <= 0.5)] = 1
    out[(hit <= c) & (salt > 0.5)] = 0
    return truncated(out)


def defocus_blur(x, c, _):
    radius, sigma = c
    reach, size = (8, 3) if radius <= 8 else (radius, 5)
    kernel = np.array([[float(i * i + j * j <= radius**2) for i in range(-reach, reach + 1)]
                       for j in range(-reach, reach + 1)])  # fmt: skip
    kernel /= kernel.sum()
    line = np.array([np.exp(-(i**2) / (2 * sigma**2)) for i in range(-(size // 2), size // 2 + 1)])
    soft = np.outer(line, line) / line.sum() ** 2
    kernel = ndimage.correlate(kernel, soft, mode="mirror")
    return truncated(np.stack([ndimage.correlate(x[..., i], kernel, mode="mirror") for i in range(x.shape[2])], -1))


def glass_blur(x, c, moves):
    sigma, reach, rounds = c

    def blurred(values):
        return ndimage.gaussian_filter(values, (sigma, sigma, 0), mode="nearest", truncate=4)

    pixels = truncated(blurred(x))
    h, w, _ = x.shape
    for i in range(rounds):
        for row in range(h - reach, reach, -1):
            for column in range(w - reach, reach, -1):
                dy, dx = moves[i, :, row, column]
                one, other = (row, column), (row + dy, column + dx)
                pixels[one], pixels[other] = pixels[other], pixels[one]  # views: see the module's docstring
    return truncated(blurred(pixels / 255))


def motion_line(x, radius, sigma, degrees):
    """ImageMagick's MotionBlurImage, the virtual pixels outside being those of the edge."""
    count = 2 * int(np.ceil(radius)) + 1
    kernel = np.exp(-(np.arange(count) ** 2) / (2 * sigma**2)) / (np.sqrt(2 * np.pi) * sigma)
    kernel /= kernel.sum()
    h, w, _ = x.shape
    out = np.zeros(x.shape)
    for i in range(count):
        down = int(np.ceil(i * np.sin(np.radians(float(degrees))) - 0.5))
        right = int(np.ceil(i * np.cos(np.radians(float(degrees))) - 0.5))
        rows, columns = np.clip(np.arange(h) + down, 0, h - 1), np.clip(np.arange(w) + right, 0, w - 1)
        out += kernel[i] * x[rows][:, columns]
    return out


def motion_blur(x, c, degrees):
    return np.floor(motion_line(x * 255, *c, degrees) + 0.5).astype(np.uint8)


def clipped_zoom(x, factor):
    n = x.shape[0]
    taken = int(np.ceil(n / factor))
    top = (n - taken) // 2
    large = ndimage.zoom(x[top : top + taken, top : top + taken], (factor, factor, 1), order=1, mode="nearest")
    cut = (large.shape[0] - n) // 2
    return large[cut : cut + n, cut : cut + n]


def zoom_blur(x, c, _):
    factors = np.arange(*c)
    return truncated((x + sum(clipped_zoom(x, factor) for factor in factors)) / (len(factors) + 1))


def snow(x, c, draws):
    flakes, degrees = draws
    layer = clipped_zoom(c[0] + c[1] * flakes[..., None].astype(np.float64), c[2])
    layer[layer < c[3]] = 0
    layer = np.floor(motion_line(truncated(layer).astype(float), c[4], c[5], degrees) + 0.5) / 255
    luma = x @ [[0.299], [0.587], [0.114]] if x.shape[2] == 3 else x
    white = c[6] * x + (1 - c[6]) * np.maximum(x, luma * 1.5 + 0.5)
    return truncated(white + layer + np.rot90(layer, k=2))


def diamond_square(draws, decay):
    n = len(draws)
    field, step, w = np.zeros((n, n)), n, 100.0
    while step >= 2:
        half = step // 2
        for places, ways in (
            ([(half, half)], [(-half, -half), (-half, half), (half, -half), (half, half)]),
            ([(0, half), (half, 0)], [(-half, 0), (half, 0), (0, -half), (0, half)]),
        ):
            for y0, x0 in places:
                for y in range(y0, n, step):
                    for x in range(x0, n, step):
                        near = [field[(y + dy) % n, (x + dx) % n] for dy, dx in ways]
                        field[y, x] = sum(near) / 4 + w * w * draws[y, x]
        step, w = half, w / decay
    return (field - field.min()) / (field.max() - field.min())


def fog(x, c, draws):
    h, w, _ = x.shape
    field = diamond_square(draws, c[1])[:h, :w, None]
    return truncated((x + c[0] * field) * x.max() / (x.max() + c[0]))


def brightness(x, c, _):
    out = np.empty((*x.shape[:2], 3))
    for place in np.ndindex(*x.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*np.broadcast_to(x[place], 3))
        out[place] = colorsys.hsv_to_rgb(hue, saturation, min(value + c, 1))
    return truncated(out[..., : x.shape[2]])


def contrast(x, c, _):
    mean = x.mean((0, 1))
    return truncated((x - mean) * c + mean)


def elastic_transform(x, c, draws):
    strength, sigma, affine = c
    points, ways = draws
    h, w, channels = x.shape
    centre, s = np.array([w // 2, h // 2]), min(h, w) // 3
    before = centre + s * np.array([[1, 1], [1, -1], [-1, -1]])  # (x, y)
    after = before + affine * points
    matrix = np.linalg.solve(np.column_stack([after, np.ones(3)]), before)  # from the new place to the old one
    grid = np.stack([*np.meshgrid(np.arange(w), np.arange(h)), np.ones((h, w))], -1)
    from_x, from_y = np.moveaxis(grid @ matrix, -1, 0)
    smooth = [ndimage.gaussian_filter(ways[..., i].astype(float), sigma, mode="reflect", truncate=3) if sigma else 0
              for i in (0, 1)]  # fmt: skip
    to_x, to_y = grid[..., 0] + strength * smooth[0], grid[..., 1] + strength * smooth[1]
    out = []
    for i in range(channels):
        moved = ndimage.map_coordinates(x[..., i], [from_y, from_x], order=1, mode="mirror")
        out.append(ndimage.map_coordinates(moved, [to_y, to_x], order=1, mode="reflect"))
    return truncated(np.stack(out, -1))


def pixelate(x, c, _):
    h, w, channels = x.shape
    image = Image.fromarray(np.round(x * 255).astype(np.uint8).squeeze())
    image = image.resize((int(w * c), int(h * c)), Image.Resampling.BOX).resize((w, h), Image.Resampling.BOX)
    return np.asarray(image).reshape(h, w, channels)


DEFINITIONS = {
    gaussian_noise: ([0.08, 0.12, 0.18, 0.26, 0.38], [0.04, 0.06, 0.08, 0.09, 0.10]),
    impulse_noise: ([0.03, 0.06, 0.09, 0.17, 0.27], [0.01, 0.02, 0.03, 0.05, 0.07]),
    defocus_blur: ([(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
                   [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)]),
    glass_blur: ([(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
                 [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)]),
    motion_blur: ([(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)], [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)]),
    zoom_blur: ([(1, 1.11, 0.01), (1, 1.16, 0.01), (1, 1.21, 0.02), (1, 1.26, 0.02), (1, 1.31, 0.03)],
                [(1, 1.06, 0.01), (1, 1.11, 0.01), (1, 1.16, 0.01), (1, 1.21, 0.01), (1, 1.26, 0.01)]),
    snow: ([(0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)],
           [(0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)]),
    fog: ([(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
          [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)]),
    brightness: ([0.1, 0.2, 0.3, 0.4, 0.5], [0.05, 0.1, 0.15, 0.2, 0.3]),
    contrast: ([0.4, 0.3, 0.2, 0.1, 0.05], [0.75, 0.5, 0.4, 0.3, 0.15]),
    elastic_transform: ([(488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88),
                         (29.28, 2.44, 4.88)],
                        [(0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)]),
    pixelate: ([0.6, 0.5, 0.4, 0.3, 0.25], [0.95, 0.9, 0.85, 0.75, 0.65]),
}  # fmt: skip


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


@pytest.mark.parametrize("severity", corruptions.SEVERITIES)
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


@pytest.mark.parametrize("definition", [d for d in DEFINITIONS if d is not glass_blur], ids=lambda d: d.__name__)
def test_grey(definition):
    """Grey images, one channel, as color images of equal channels."""
    check(definition, pictures(1, SMALL, channels=1), 3)


def test_grey_glass_blur():
    """Of one channel a view is a view as well."""
    check(glass_blur, pictures(1, SMALL, channels=1), 5)


def test_shot_noise():
    """Counts of photons have Poisson's distribution: chi-squared over its values, one image of each of four levels."""
    levels = np.array([0, 3, 130, 255], np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (4, SMALL, SMALL, 3))
    for severity, photons in ((1, 500), (5, 50)):
        tables, counts = drawn("shot_noise", images, severity)
        np.testing.assert_array_equal(counts[0], 0)
        for level, found in zip(levels[1:], counts[1:], strict=True):
            law = stats.poisson(level / 255 * photons)
            edges = np.unique(law.ppf(np.linspace(0, 1, 12)[1:-1]))  # bins (-inf, e0], (e0, e1], …
            bins = np.bincount(np.searchsorted(edges, found.ravel()), minlength=len(edges) + 1)
            shares = np.diff([0, *law.cdf(edges), 1])
            assert stats.chisquare(bins, found.size * shares).pvalue > 1e-3
        out = _jitted["shot_noise"](images, tables, counts)
        np.testing.assert_allclose(out, truncated(counts / photons), atol=1)


def test_draws():
    """Each random field has the published law."""
    images = pictures(8, SMALL)
    for name, severity, law in (
        ("gaussian_noise", 1, stats.norm()),
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
    for definition in (gaussian_noise, defocus_blur, glass_blur, motion_blur, fog, contrast, pixelate):
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
    np.testing.assert_allclose(out, np.stack([contrast(x / 255, 0.3 / 2, None) for x in np.asarray(images)]), atol=1)
    with pytest.raises(UserError, match=r"unknown corruption 'fogg': did you mean 'fog'"):
        corruptions.corrupt("fogg", images, 5, jnp.arange(2, dtype=jnp.int32))
    with pytest.raises(UserError, match="severity=6: wants 1 to 5"):
        corruptions.corrupt("fog", images, 6, jnp.arange(2, dtype=jnp.int32))
    with pytest.raises(UserError, match="these have 4 channels"):
        corruptions.tables_of("fog", 5, (16, 16, 4))


def test_all_but_frost():
    """The fifteen of the paper, in its order, without the one that needs photographs."""
    paper = """gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost fog
               brightness contrast elastic_transform pixelate jpeg_compression""".split()  # noqa: SIM905
    assert [name for name in paper if name not in corruptions.LEFT_OUT] == list(corruptions.CORRUPTIONS)
