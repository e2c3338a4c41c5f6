"""The fifteen common corruptions at five severities (Hendrycks and Dietterich 2019, arXiv:1903.12261), as device ops.

Definitions and constants follow the authors' public code for ImageNet-C and CIFAR-10-C. Images with a shorter side
below 85 pixels use the constants of CIFAR-10-C, published for 32 pixels; others use those of ImageNet-C, published for
224. 85 is the geometric mean. Lengths are in pixels, as published, except that `elastic_transform` uses fractions of
the side. `frost` overlays the authors' photographs, which are not shipped here; `frost.read` reads them from a folder.

A corruption maps uint8[b, h, w, c] to the same shape and dtype, with c 1 or 3. Its random values for an example depend
only on a seed, the corruption, the severity and the example's position in its set. Grayscale images behave like RGB
images with equal channels, except that noise is drawn once.

Results match the libraries that the published code calls: OpenCV's borders, SciPy's interpolation, scikit-image's noise
and Gaussian filter, ImageMagick's motion blur, and Pillow's resizing and JPEG. Known differences:

- OpenCV 4 rounds the coordinates of the affine map in `elastic_transform` to 1/32 pixel; OpenCV 5 and this code do not.
- Recent builds of ImageMagick without HDRI truncate the levels of `motion_blur` and `snow`. Builds of 2019 rounded
  them, and so does this code.
- The published `glass_blur` means to swap pixels, but copies them, because both sides of its NumPy swap are views. This
  code copies too.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.core import rng
from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.core.typing import PyTree
from imgclf_jax.tools.evaluate import corruption_ops as ops
from imgclf_jax.tools.evaluate import fields, frost
from imgclf_jax.tools.evaluate.fields import Constant, Constants, Tables
from imgclf_jax.tools.evaluate.jpeg import jpeg

SEVERITIES = (1, 2, 3, 4, 5)
_SMALL = 85  # shorter sides below this use the constants of CIFAR-10-C, others those of ImageNet-C


class Corruption(NamedTuple):
    """A corruption in three parts, so that one compiled program serves all severities and tests can fix the draws.

    - `constants` are the published ones of ImageNet-C and CIFAR-10-C, for severities 1 to 5.
    - `tables` maps a constant, (h, w) and all constants to arrays, whose shapes are equal for all severities.
    - `draw` draws the random values for one example, from its key, its image uint8[h, w, c] and the tables.
    - `apply` takes images, tables and the draws for all examples.
    """

    constants: tuple[Constants, Constants]
    tables: Callable[[Constant, int, int, Constants], Tables]
    apply: Callable[[jax.Array, Tables, PyTree], jax.Array]
    draw: Callable[[jax.Array, jax.Array, Tables], PyTree] = lambda key, image, tables: ()


def make_tables(
    name: str, severity: int, shape: tuple[int, ...], photographs: Sequence[np.ndarray] = ()
) -> Tables:  # fmt: skip
    """Returns the tables of a corruption at a severity, for images of `shape` (h, w, c), as NumPy arrays.

    `photographs`, needed for `frost` only, come from `frost.read`. Raises UserError for an unknown name or severity,
    for images that are neither grayscale nor RGB or too small for the corruption, and for `frost` without photographs.
    """
    if name not in CORRUPTIONS:
        raise UserError(unknown("corruption", name, CORRUPTIONS))
    if severity not in SEVERITIES:
        raise UserError(f"severity={severity}: must be 1 to 5")
    h, w, c = shape
    if c not in (1, 3):
        raise UserError(f"corruptions need grayscale or RGB images, but these have {c} channels")
    if name == "elastic_transform" and min(h, w) < 3:  # it moves points a third of the side from the center
        raise UserError(
            f"{name} needs at least 3 pixels a side, but these images have {h} x {w}; name other corruptions"
        )
    if name == "fog" and max(h, w) < 2:  # the plasma of one pixel has no range to scale to
        raise UserError(
            f"{name} needs at least 2 pixels on one side, but these images have 1 x 1; name other corruptions"
        )
    corruption = CORRUPTIONS[name]
    small = min(h, w) < _SMALL
    constants = corruption.constants[small]
    tables = corruption.tables(constants[severity - 1], h, w, constants)
    if name == "frost":
        if not photographs:
            raise UserError("frost overlays photographs: pass `photographs=frost.read(folder)`, where the folder is "
                            f"{frost.SOURCE}")  # fmt: skip
        tables |= frost.fit_photographs(photographs, (h, w, c), small)
    return tables


def make_key(name: str, severity: int, seed: int) -> jax.Array:
    """Returns the key that a corruption at a severity folds the examples' positions into."""
    return rng.key(seed, f"corruption/{name}", severity)


def apply(name: str, images: jax.Array, tables: Tables, key: jax.Array, positions: jax.Array) -> jax.Array:
    """Corrupts uint8[b, h, w, c], given `tables` and `key` for a severity, and positions i32[b] in the set."""
    corruption = CORRUPTIONS[name]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, positions)
    draws = jax.vmap(corruption.draw, (0, 0, None))(keys, images, tables)
    return corruption.apply(images, tables, draws)


def corrupt(
    name: str, images: jax.Array, severity: int, positions: jax.Array, seed: int = 0,
    photographs: Sequence[np.ndarray] = (),
) -> jax.Array:  # fmt: skip
    """Applies the corruption `name` at a severity of 1 to 5 to images uint8[b, h, w, c].

    `positions` i32[b] are the images' positions in their set. `photographs` are for `frost`. Raises UserError as
    `make_tables` does.
    """
    tables = jax.tree.map(jnp.asarray, make_tables(name, severity, images.shape[1:], photographs))
    return apply(name, images, tables, make_key(name, severity, seed), positions)


# Severities 1 to 5 of ImageNet-C, then of CIFAR-10-C, from the authors' `make_imagenet_c.py` and `make_cifar_c.py`.
CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(
        ((0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10)), ops.scalar,
        lambda images, tables, noise: ops.to_uint8(ops.to_unit(images) + tables["c"] * noise),
        lambda key, image, tables: jax.random.normal(key, image.shape),
    ),
    "shot_noise": Corruption(
        ((60, 25, 12, 5, 3), (500, 250, 100, 75, 50)), ops.shot_tables, ops.shot,
        lambda key, image, tables: jax.random.uniform(key, image.shape),
    ),
    "impulse_noise": Corruption(
        ((0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07)), ops.scalar, ops.impulse, ops.impulse_draw,
    ),
    "defocus_blur": Corruption(  # disk radius, sigma of its anti-aliasing blur
        (((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
         ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
        ops.defocus_tables,
        lambda images, tables, draws: ops.to_uint8(fields.convolve(ops.to_unit(images), tables["kernel"])),
    ),
    "glass_blur": Corruption(  # sigma, reach, rounds
        (((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
         ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))),
        ops.glass_tables, ops.glass, ops.glass_draw,
    ),
    "motion_blur": Corruption(  # radius, sigma
        (((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)), ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
        ops.motion_tables, ops.motion, lambda key, image, tables: jax.random.uniform(key, minval=-45, maxval=45),
    ),
    "zoom_blur": Corruption(  # start, stop and step of the factors
        (((1, 1.11, 0.01), (1, 1.16, 0.01), (1, 1.21, 0.02), (1, 1.26, 0.02), (1, 1.31, 0.03)),
         ((1, 1.06, 0.01), (1, 1.11, 0.01), (1, 1.16, 0.01), (1, 1.21, 0.01), (1, 1.26, 0.01))),
        ops.zoom_tables, ops.zoom,
    ),
    "snow": Corruption(  # mean, std, zoom, threshold, radius, sigma, weight of the original image
        (((0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
          (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)),
         ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
          (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8))),
        ops.snow_tables, ops.snow, ops.snow_draw,
    ),
    "frost": Corruption(  # weights of the image and the photograph; `make_tables` adds the photographs
        (((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
         ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
        frost.weights, frost.frost, frost.draw,
    ),
    "fog": Corruption(  # amount, decay
        (((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)), ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
        ops.fog_tables, ops.fog, ops.fog_draw,
    ),
    "brightness": Corruption(((0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3)), ops.scalar, ops.brightness),
    "contrast": Corruption(((0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)), ops.scalar, ops.contrast),
    "elastic_transform": Corruption(  # strength, sigma, affine reach; ImageNet-C's are fractions of 244 for 224 pixels
        (tuple(tuple(244 / 224 * fraction for fraction in each) for each in
               ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))),
         ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))),
        ops.elastic_tables, ops.elastic, ops.elastic_draw,
    ),
    "pixelate": Corruption(
        ((0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65)), ops.pixelate_tables, ops.pixelate,
    ),
    "jpeg_compression": Corruption(  # quality
        ((25, 18, 15, 10, 7), (80, 65, 58, 50, 40)), ops.jpeg_tables,
        lambda images, tables, draws: jpeg(images, tables["quantization"]),
    ),
}  # fmt: skip
