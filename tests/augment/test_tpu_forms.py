"""What device ops do on TPU, without gathers and scatters, is to the bit what they do elsewhere.

Both forms run on CPU. The quick tests hold every op at its strongest; the slow ones all kinds of images and magnitudes.
"""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough
from test_photometric import photos, unusual

from imgclf_jax.augment import big_vision, geometry, policies
from imgclf_jax.core import platform

SETS = {"colour": photos(32), "oblong": photos(45)[:, 4:24], "tall": photos(41)[:, :, 3:26], "grey": unusual(19, 1),
        "tiny": unusual(3, 3)}  # fmt: skip
NARROW, WIDE = ((0.3, 12.0, 9.0, 30.0, 0.9, 4), (0.99, 32.0, 32.0, 135.0, 0.99, 6))  # of randaugment, trivialaugment


def assert_equal(function, images):
    """The function gives the same images as traced for no platform and for TPU."""
    usual, on_tpu = (jax.jit(platform.tracing_for(name)(lambda x: function(x)))(images) for name in ("", "tpu"))
    np.testing.assert_array_equal(on_tpu, usual)


def pairs(values, quick):
    """All pairs of a set of images and one of `values`; the quick ones are thorough, the others slow."""
    return [*thorough(*quick), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in product(SETS, values)
                                 if pair not in quick)]  # fmt: skip


@pytest.mark.parametrize(("kind", "magnitude"), pairs([0, 5, 10], [("oblong", 10), ("grey", 5)]))
def test_every_op_of_big_vision(kind, magnitude):
    """Both signs, each image with its own cutout."""
    n, (_, h, w, c) = 2 * len(big_vision.OPS), SETS[kind].shape
    images = SETS[kind][np.arange(n) % len(SETS[kind])]
    op, negative = (jnp.asarray(v) for v in np.divmod(np.arange(n), 2))
    rng = np.random.default_rng(0)
    centre = tuple(jnp.asarray(rng.integers(0, side, n)) for side in (h, w))
    fill = jnp.full(c, 128, jnp.uint8)
    assert_equal(lambda x: big_vision.apply(x, op, negative, centre, magnitude, fill), images)


@pytest.mark.parametrize(("kind", "ranges"), pairs([NARROW, WIDE], [("oblong", WIDE), ("grey", NARROW)]))
def test_every_op_of_torchvision(kind, ranges):
    """Both signs, at magnitudes 0, 5, 15 and 30."""
    images = SETS[kind]
    ranges, (_, h, w, c) = policies.Ranges(*ranges), images.shape
    place = tuple(v.ravel() for v in np.meshgrid(np.arange(len(policies.OPS)), [0, 1], [0, 5, 15, 30]))
    table, op = policies.strengths(ranges, h, w), jnp.asarray(place[0])
    drawn = policies.Strengths(table.matrix[place], table.factor[place], table.level[place])
    fill = jnp.arange(7, 7 + c, dtype=jnp.uint8)
    assert_equal(lambda x: policies.apply(x, op, drawn, fill), images[np.arange(len(op)) % len(images)])


LARGER = [pytest.param(*size, marks=pytest.mark.slow) for size in ((97, 131), (140, 60), (500, 600))]


@pytest.mark.parametrize("most", [135, *thorough(1, 30, 37, 45, 90)])
@pytest.mark.parametrize(("h", "w"), [(64, 64), *LARGER])
def test_rotations_by_any_angle(most, h, w):
    """A pixel further off its place than the form allows would come out wrong."""
    degrees = np.linspace(-most, most, 31)
    matrix = jnp.asarray(np.stack([geometry.fixed_point(geometry.rotate(float(d), h, w)) for d in degrees]))
    images = np.random.default_rng(0).integers(0, 256, (len(degrees), h, w, 3), np.uint8)
    fill = jnp.zeros(3, jnp.uint8)
    assert_equal(lambda x: geometry.affine(x, matrix, fill), images)
