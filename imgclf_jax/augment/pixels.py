"""Conversion of augmented images to viewable pixels."""

import inspect

import numpy as np

from imgclf_jax.augment import ops
from imgclf_jax.core import spec


def to_pixels(images: np.ndarray, text: str) -> tuple[np.ndarray, bool]:
    """Undoes `normalize` in the images f32[b, h, w, c] that the device ops of the spec `text` return.

    Returns f32 in [0, 1], and whether the values were stretched from their smallest to their largest, as needed for a
    user's own op of unknown range.
    """
    calls = [call for call in spec.parse(text) if call.name == "normalize"]
    for call in reversed(calls):
        known = inspect.signature(ops.normalize).bind(None, *call.args, **call.kwargs)
        known.apply_defaults()
        mean, std = (np.asarray(known.arguments[name], np.float32) for name in ("mean", "std"))
        images = (images * std + mean) * (1 if call is calls[0] else 255)
    finite = images[np.isfinite(images)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if calls or (low >= 0 and high <= 1):
        return np.clip(images, 0, 1).astype(np.float32), False
    return ((images - low) / (high - low or 1.0)).astype(np.float32), True
