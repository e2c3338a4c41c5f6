"""Conversion of augmented images to viewable pixels."""

import inspect

import numpy as np

from imgclf_jax.augment import ops
from imgclf_jax.core import spec


def to_pixels(images: np.ndarray, text: str) -> np.ndarray:
    """Undoes `normalize` in the images f32[b, h, w, c] that the device ops of the spec `text` return: f32 in [0, 1]."""
    for call in (call for call in spec.parse(text) if call.name == "normalize"):  # at most one
        known = inspect.signature(ops.normalize).bind(None, *call.args, **call.kwargs)
        known.apply_defaults()
        mean, std = (np.asarray(known.arguments[name], np.float32) for name in ("mean", "std"))
        images = images * std + mean
    return np.clip(images, 0, 1).astype(np.float32)
