"""Conversion of augmented images to viewable pixels."""

import inspect

import numpy as np

from imgclf_jax.augment import ops
from imgclf_jax.core import spec

_ROUNDING = 1e-3  # how far rounding takes values out of [0, 1], and less than one of 255 levels


def denormalize(images: np.ndarray, text: str) -> tuple[np.ndarray, tuple[float, float], str]:
    """Undoes the `normalize` in the images f32[b, h, w, c] that the device ops of the spec `text` return.

    Returns f32[b, h, w, c], the values to show black and white, and the formula. The values are 0 and 1, or the
    smallest and the largest if a user's own op, whose range is unknown, leaves 0 to 1. The formula is "" if nothing
    changes.
    """
    calls, formula = spec.parse(text), ""
    for call in (call for call in calls if call.name == "normalize"):  # at most one
        known = inspect.signature(ops.normalize).bind(None, *call.args, **call.kwargs)
        known.apply_defaults()
        mean, std = (np.asarray(known.arguments[name], np.float32) for name in ("mean", "std"))
        images = images * std + mean
        formula = f"x * {std.tolist()} + {mean.tolist()}" if call.args or call.kwargs else ""
    finite = images[np.isfinite(images)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if not any(":" in call.name for call in calls) or (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        low, high = 0.0, 1.0
    return images, (low, high if high > low else low + 1), formula


def to_pixels(images: np.ndarray, text: str) -> tuple[np.ndarray, bool]:
    """Undoes `normalize` for viewing (see `denormalize`).

    Returns f32 in [0, 1], and whether the values were stretched from their smallest to their largest.
    """
    values, (low, high), _ = denormalize(images, text)
    return np.clip((values - low) / (high - low), 0, 1).astype(np.float32), (low, high) != (0, 1)
