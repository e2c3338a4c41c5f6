"""The feature-first memory layout of the CPU layers: [c, h, w, b] for images and [d, b] for features.

Layers still take and return [b, h, w, c] and [b, d]. XLA cancels the two transposes between one layer and the next.
"""

import jax
import jax.numpy as jnp

from imgclf_jax.core import platform


def wants_features_first() -> bool:
    """Whether layers compute on feature-first arrays: in programs for CPU, except on oneDNN."""
    return platform.current() == "cpu" and not platform.uses_onednn()


def features_first(x: jax.Array) -> jax.Array:
    """Transposes [b, h, w, c] → [c, h, w, b], or [b, d] → [d, b]."""
    return x.transpose(3, 1, 2, 0) if x.ndim == 4 else x.T


features_last = features_first  # it is its own inverse


def accumulator(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The accumulation dtype of matmuls with operands in `dtype`: float32, or float64 for float64."""
    return jnp.dtype(dtype if dtype == jnp.float64 else jnp.float32)
