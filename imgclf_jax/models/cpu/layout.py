"""How arrays lie in memory where layers compute on CPU: features first and the batch last, [c, h, w, b] and [d, b, n].

Only the layers' CPU form uses this. What they give and take is [b, h, w, c] or [b, n, d]; `rewrite.py` cancels the
transposes between two layers.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from imgclf_jax.core import platform


def on_cpu() -> bool:
    """Whether what is traced is for CPU."""
    return platform.current() == "cpu"


def _features_first(ndim: int) -> list[int]:
    """Which axis of the array each axis in memory is."""
    return [3, 1, 2, 0] if ndim == 4 else [ndim - 1, *range(ndim - 1)]


def features_first(x: jax.Array) -> jax.Array:
    """[b, h, w, c] → [c, h, w, b]. Of any other rank the last axis comes first, as in [b, n, d] → [d, b, n]."""
    return x.transpose(_features_first(x.ndim))


def features_last(x: jax.Array) -> jax.Array:
    """The inverse of `features_first`."""
    order = _features_first(x.ndim)
    return x.transpose([order.index(axis) for axis in range(x.ndim)])


def contiguous(x: jax.Array) -> jax.Array:
    """x itself, computed here and laid out in memory as its shape says.

    Without it XLA leaves a transposed x where it lies and reads it across its rows, or computes x anew, as often as
    needed, inside of what reads it. Outside of `jit` it has no say.
    """
    if not isinstance(x, jax.core.Tracer):
        return x
    return lax.optimization_barrier(with_layout_constraint(x, Layout(tuple(range(x.ndim)))))


def accumulator(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """What products of operands in `dtype` are summed in: float32, or float64 for float64."""
    return jnp.dtype(dtype if dtype == jnp.float64 else jnp.float32)
