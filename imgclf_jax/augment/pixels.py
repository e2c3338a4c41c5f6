"""Conversion of augmented images to viewable pixels."""

import inspect

import numpy as np

from imgclf_jax.augment import ops
from imgclf_jax.core import spec

_ROUNDING = 1e-3  # how far rounding takes values out of [0, 1], and less than one of 255 levels


def to_pixels(images: np.ndarray, text: str) -> tuple[np.ndarray, bool]:
    """Undoes `normalize` in the images f32[b, h, w, c] that the device ops of the spec `text` return, for viewing.

    Returns f32 in [0, 1], and whether the values were stretched from their smallest to their largest, as they are if a
    user's own op, whose range is unknown, leaves 0 to 1.
    """
    calls = spec.parse(text)
    for call in (call for call in calls if call.name == "normalize"):  # at most one
        known = inspect.signature(ops.normalize).bind(None, *call.args, **call.kwargs)
        known.apply_defaults()
        mean, std = (np.asarray(known.arguments[name], np.float32) for name in ("mean", "std"))
        images = images * std + mean
    finite = images[np.isfinite(images)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    stretched = any(":" in call.name for call in calls) and (low < -_ROUNDING or high > 1 + _ROUNDING)
    if not stretched:
        low, high = 0.0, 1.0
    return np.clip((images - low) / ((high - low) or 1.0), 0, 1).astype(np.float32), stretched
