"""The feature-first memory layout of the CPU layers: [c, h, w, b] for images and [d, b, n] for tokens.

Layers still take and return [b, h, w, c] or [b, n, d]; `rewrite.py` cancels the transposes between two layers.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from imgclf_jax.core import platform


def wants_features_first() -> bool:
    """Whether layers compute on feature-first arrays: in programs for CPU, except on oneDNN."""
    return platform.current() == "cpu" and not platform.uses_onednn()


def _permutation(ndim: int) -> list[int]:
    """The transpose permutation from the usual to the feature-first layout."""
    return [3, 1, 2, 0] if ndim == 4 else [ndim - 1, *range(ndim - 1)]


def features_first(x: jax.Array) -> jax.Array:
    """Transposes [b, h, w, c] → [c, h, w, b]; at any other rank moves the last axis first, [b, n, d] → [d, b, n]."""
    return x.transpose(_permutation(x.ndim))


def features_last(x: jax.Array) -> jax.Array:
    """The inverse of `features_first`."""
    order = _permutation(x.ndim)
    return x.transpose([order.index(axis) for axis in range(x.ndim)])


def contiguous(x: jax.Array) -> jax.Array:
    """Materializes x in row-major layout.

    Without it XLA keeps a transposed x in place and reads it across its rows, or recomputes x inside each consumer.
    Outside `jit` it has no effect.
    """
    if not isinstance(x, jax.core.Tracer):
        return x
    return lax.optimization_barrier(with_layout_constraint(x, Layout(tuple(range(x.ndim)))))


def accumulator(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The accumulation dtype of matmuls with operands in `dtype`: float32, or float64 for float64."""
    return jnp.dtype(dtype if dtype == jnp.float64 else jnp.float32)
