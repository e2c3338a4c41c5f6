"""The common corruptions of images at five severities (Hendrycks and Dietterich 2019, arXiv:1903.12261), as device ops.

The definitions and constants are those of the authors' public programs that made ImageNet-C and CIFAR-10-C. Images
whose shorter side is below 85 get the constants of CIFAR-10-C, published for 32 pixels; others get those of ImageNet-C,
published for 224. 85 is the geometric mean of both. Lengths are in pixels, as published, but for `elastic_transform`,
whose lengths are shares of the side. `frost` lays photographs over the image, which are not ours to give: whoever has
them reads them by `frost.read`.

A corruption takes uint8[b, h, w, c] and gives the same, c being 1 or 3. What it draws for an example follows from a
seed, the corruption, the severity and the example's place in its set alone. Grey images are treated as RGB images of
equal channels, but noise is drawn once.

Where the published programs call libraries, these are held to: OpenCV's borders, SciPy's interpolation, scikit-image's
noise and Gaussian filter, ImageMagick's motion blur, Pillow's resizing and JPEG. Known differences: OpenCV 4 rounds the
places of the affine map in `elastic_transform` to 1/32 pixel, which neither OpenCV 5 nor this does. Recent builds of
ImageMagick without HDRI cut the levels of `motion_blur` and `snow` off; those of the time rounded them, as is done
here. `glass_blur` was meant to swap pixels. The published program copies them, since in NumPy both sides of its swap
are views; that is done here.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.core import rng
from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.tools.evaluate import corruption_ops as ops
from imgclf_jax.tools.evaluate import fields, frost
from imgclf_jax.tools.evaluate.fields import Tables
from imgclf_jax.tools.evaluate.jpeg import jpeg

SEVERITIES = (1, 2, 3, 4, 5)
_BORDER = 85  # of the shorter side, in pixels: constants of CIFAR-10-C below, of ImageNet-C from here on


class Corruption(NamedTuple):
    """A corruption in three parts, so that one compiled program serves all severities and tests know the draws.

    `constants` are the published ones, severity 1 to 5, of ImageNet-C and of CIFAR-10-C. `tables` turns one of them and
    (h, w) into arrays, whose shapes do not depend on the severity. `draw` gives what is random for one example, from
    its key and its image uint8[h, w, c]. `apply` takes images, tables and the draws of all.
    """

    constants: tuple[tuple[Any, ...], tuple[Any, ...]]
    tables: Callable[[Any, int, int, tuple[Any, ...]], Tables]
    apply: Callable[[jax.Array, Tables, Any], jax.Array]
    draw: Callable[[jax.Array, jax.Array, Tables], Any] = lambda key, image, tables: ()


def tables_of(
    name: str, severity: int, shape: tuple[int, ...], photographs: Sequence[np.ndarray] = ()
) -> Tables:  # fmt: skip
    """The tables of a corruption at a severity, for images of the shape (h, w, c): NumPy arrays.

    `photographs` are those of `frost.read`, for `frost` alone. Raises UserError for an unknown name or severity, for
    images that are neither grey nor RGB, and for `frost` without photographs.
    """
    if name not in CORRUPTIONS:
        raise UserError(unknown("corruption", name, CORRUPTIONS))
    if severity not in SEVERITIES:
        raise UserError(f"severity={severity}: wants 1 to 5")
    h, w, c = shape
    if c not in (1, 3):
        raise UserError(f"corruptions are defined for grey and RGB images, these have {c} channels")
    corruption = CORRUPTIONS[name]
    small = min(h, w) < _BORDER
    constants = corruption.constants[small]
    tables = corruption.tables(constants[severity - 1], h, w, constants)
    if name == "frost":
        if not photographs:
            raise UserError(f"frost lays photographs over the image: give those of `frost.read`; they are in "
                            f"{frost.SOURCE}")  # fmt: skip
        tables |= frost.fitted(photographs, (h, w, c), small)
    return tables


def key_of(name: str, severity: int, seed: int) -> jax.Array:
    """The key below which a corruption at a severity draws."""
    return rng.key(seed, f"corruption/{name}", severity)


def with_tables(name: str, images: jax.Array, tables: Tables, key: jax.Array, places: jax.Array) -> jax.Array:
    """The corruption `name` of uint8[b, h, w, c] by its `tables`; `places` i32[b] number the examples below `key`."""
    corruption = CORRUPTIONS[name]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, places)
    draws = jax.vmap(corruption.draw, (0, 0, None))(keys, images, tables)
    return corruption.apply(images, tables, draws)


def corrupt(
    name: str, images: jax.Array, severity: int, places: jax.Array, seed: int = 0,
    photographs: Sequence[np.ndarray] = (),
) -> jax.Array:  # fmt: skip
    """The corruption `name` of images uint8[b, h, w, c] at a severity of 1 to 5, which are at `places` i32[b] of a set.

    `photographs` are for `frost`. Raises UserError as `tables_of` does.
    """
    tables = jax.tree.map(jnp.asarray, tables_of(name, severity, images.shape[1:], photographs))
    return with_tables(name, images, tables, key_of(name, severity, seed), places)


# Severities 1 to 5 of ImageNet-C, then of CIFAR-10-C: `make_imagenet_c.py` and `make_cifar_c.py` of the authors.
CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(
        ((0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10)), ops.number,
        lambda images, tables, noise: ops.cut(ops.unit(images) + tables["c"] * noise),
        lambda key, image, tables: jax.random.normal(key, image.shape),
    ),
    "shot_noise": Corruption(
        ((60, 25, 12, 5, 3), (500, 250, 100, 75, 50)), ops.shot_tables, ops.shot,
        lambda key, image, tables: jax.random.uniform(key, image.shape),
    ),
    "impulse_noise": Corruption(
        ((0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07)), ops.number, ops.impulse, ops.impulse_draw,
    ),
    "defocus_blur": Corruption(  # radius, blur of the disk
        (((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
         ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
        ops.defocus_tables,
        lambda images, tables, draws: ops.cut(fields.filtered(ops.unit(images), tables["kernel"])),
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
    "zoom_blur": Corruption(  # the factors, from, below, step
        (((1, 1.11, 0.01), (1, 1.16, 0.01), (1, 1.21, 0.02), (1, 1.26, 0.02), (1, 1.31, 0.03)),
         ((1, 1.06, 0.01), (1, 1.11, 0.01), (1, 1.16, 0.01), (1, 1.21, 0.01), (1, 1.26, 0.01))),
        ops.zoom_tables, ops.zoom,
    ),
    "snow": Corruption(  # mean, deviation, zoom, least, radius, sigma, share of the image that is kept
        (((0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
          (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)),
         ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
          (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8))),
        ops.snow_tables, ops.snow, ops.snow_draw,
    ),
    "frost": Corruption(  # shares of the image and of the photograph; `tables_of` adds these
        (((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
         ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
        frost.shares, frost.frost, frost.draw,
    ),
    "fog": Corruption(  # amount, decay
        (((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)), ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
        ops.fog_tables, ops.fog, ops.fog_draw,
    ),
    "brightness": Corruption(((0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3)), ops.number, ops.brightness),
    "contrast": Corruption(((0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)), ops.number, ops.contrast),
    "elastic_transform": Corruption(  # strength, sigma, reach of the affine map; ImageNet-C's are shares of 244 at 224
        (tuple(tuple(244 / 224 * share for share in each) for each in
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
