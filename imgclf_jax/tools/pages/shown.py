"""Images that device ops have changed, as they can be looked at."""

import inspect

import numpy as np

from imgclf_jax.augment import ops
from imgclf_jax.core import spec


def as_pixels(images: np.ndarray, text: str) -> tuple[np.ndarray, bool]:
    """Undoes `normalize` in images f32[b, h, w, c], which the device ops of a spec gave: f32 in [0, 1].

    The flag says whether they had to be stretched from their least to their greatest value: an op that the spec names
    by its import path may give any range.
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
