"""How arrays lie in memory where layers compute on CPU: features first and the batch last, [c, h, w, b] and [d, b, n].

Only the layers' CPU form uses this. What they give and take is [b, h, w, c] or [b, n, d]; `rewrite.py` cancels the
transposes between two layers.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from imgclf_jax.core import platform

# Axis i of the array in memory is this axis of [b, c], [b, n, d] and [b, h, w, c].
_FEATURES_FIRST = {2: (1, 0), 3: (2, 0, 1), 4: (3, 1, 2, 0)}


def on_cpu() -> bool:
    """Whether what is traced is for CPU."""
    return platform.current() == "cpu"


def features_first(x: jax.Array) -> jax.Array:
    """[b, h, w, c] → [c, h, w, b], [b, n, d] → [d, b, n], [b, c] → [c, b]."""
    return x.transpose(_FEATURES_FIRST[x.ndim])


def features_last(x: jax.Array) -> jax.Array:
    """The inverse of `features_first`."""
    order = _FEATURES_FIRST[x.ndim]
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
