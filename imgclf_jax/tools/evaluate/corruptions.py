"""Six common corruptions at five severities (Hendrycks and Dietterich 2019, arXiv:1903.12261), on the host.

Definitions and constants follow the authors' code for ImageNet-C and CIFAR-10-C. Images with a shorter side below 85
pixels use the constants of CIFAR-10-C, published for 32 pixels; others use those of ImageNet-C, published for 224. 85
is the geometric mean. The authors' own images, with weather and further blurs, are data sets of TFDS.
"""

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from imgclf_jax.core.errors import UserError
from imgclf_jax.data.resizing import to_pillow

SEVERITIES = (1, 2, 3, 4, 5)
_SMALL = 85  # shorter sides below this use the constants of CIFAR-10-C, others those of ImageNet-C


class Corruption(NamedTuple):
    """A corruption `apply(image uint8[h, w, c], constant, random) -> uint8[h, w, c]`, and its published constants."""

    imagenet_c: tuple[float, ...]  # for severities 1 to 5
    cifar_10_c: tuple[float, ...]
    apply: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


def corrupt(name: str, severity: int, image: np.ndarray, position: int) -> np.ndarray:
    """Returns uint8[h, w, c] of the same shape, c 1 or 3, for the example at `position` of its set.

    The noise depends on the severity and the position alone. Raises UserError for other numbers of channels.
    """
    if image.shape[-1] not in (1, 3):
        raise UserError(f"corruptions need grayscale or RGB images, but these have {image.shape[-1]} channels")
    corruption = CORRUPTIONS[name]
    constants = corruption.cifar_10_c if min(image.shape[:2]) < _SMALL else corruption.imagenet_c
    return corruption.apply(image, constants[severity - 1], np.random.default_rng((severity, position)))


def _add_noise(image: np.ndarray, std: float, random: np.random.Generator) -> np.ndarray:
    return _to_levels(image / 255 + random.normal(0, std, image.shape))


def _blur(image: np.ndarray, sigma: float, random: np.random.Generator) -> np.ndarray:
    return _to_levels(ndimage.gaussian_filter(image / 255, (sigma, sigma, 0), mode="nearest"))


def _brighten(image: np.ndarray, added: float, random: np.random.Generator) -> np.ndarray:
    """Adds to the HSV value, to which the channels are proportional at fixed hue and saturation."""
    value = image.max(-1, keepdims=True) / 255
    brighter = np.minimum(value + added, 1)
    return _to_levels(np.where(value > 0, image / 255 * brighter / np.where(value > 0, value, 1), brighter))


def _reduce_contrast(image: np.ndarray, factor: float, random: np.random.Generator) -> np.ndarray:
    mean = image.mean((0, 1)) / 255
    return _to_levels((image / 255 - mean) * factor + mean)


def _pixelate(image: np.ndarray, factor: float, random: np.random.Generator) -> np.ndarray:
    h, w = image.shape[:2]
    small = to_pillow(image).resize((max(1, int(w * factor)), max(1, int(h * factor))), Image.Resampling.BOX)
    return np.asarray(small.resize((w, h), Image.Resampling.BOX)).reshape(image.shape)


def _compress(image: np.ndarray, quality: float, random: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    to_pillow(image).save(file, "JPEG", quality=int(quality))
    return np.asarray(Image.open(file)).reshape(image.shape)


def _to_levels(values: np.ndarray) -> np.ndarray:
    """Converts values in [0, 1], with clipping, to uint8 by truncation, as published."""
    return (np.clip(values, 0, 1) * 255).astype(np.uint8)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption((0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10), _add_noise),
    "gaussian_blur": Corruption((1, 2, 3, 4, 6), (0.4, 0.6, 0.7, 0.8, 1), _blur),
    "brightness": Corruption((0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3), _brighten),
    "contrast": Corruption((0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15), _reduce_contrast),
    "pixelate": Corruption((0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65), _pixelate),
    "jpeg_compression": Corruption((25, 18, 15, 10, 7), (80, 65, 58, 50, 40), _compress),
}
