"""How arrays lie in memory while layers compute on them, and what element-wise operations compute in.

On CPU a model's images lie mirrored, [c, h, w, b], and tokens with their features first, [d, b, n]; layers are matrix
products (`mirrored.py` says why). `inner` takes images there and back, `tokens` tokens there; between two layers the
pair cancels, so the compiled program holds none. On GPU and TPU they lie as they come, [b, h, w, c] and [b, n, d].
"""

import jax
import jax.numpy as jnp
from jax import lax

from imgclf_jax.core import platform


def on_mirrored() -> bool:
    """Whether layers compute on images [c, h, w, b]: on CPU."""
    return platform.current() == "cpu"


def mirror(x: jax.Array) -> jax.Array:
    """[b, h, w, c] to [c, h, w, b], and back."""
    return jnp.swapaxes(x, 0, 3)


def inner(x: jax.Array) -> jax.Array:
    """Images [b, h, w, c] as layers compute on them, and back: mirrored on CPU, as they are elsewhere.

    Height and width are the axes 1 and 2 of both, so that a network may stay in it from first layer to last.
    """
    return mirror(x) if on_mirrored() else x


def channel_axis() -> int:
    """Which axis of `inner` images the channels are."""
    return 0 if on_mirrored() else 3


def widen(x: jax.Array) -> jax.Array:
    """x in float32, or in float64 if it is: what element-wise operations compute in, whatever lies in memory."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def tokens(x: jax.Array) -> jax.Array:
    """Tokens [b, n, d] as layers compute on them: features first on CPU, [d, b, n], as they are elsewhere."""
    return jnp.moveaxis(x, 2, 0) if on_mirrored() else x


def features_axis() -> int:
    """Which axis of `tokens` the features are, 0 or -1."""
    return 0 if on_mirrored() else -1


def spread(values: jax.Array, axis: int, x: jax.Array) -> jax.Array:
    """[c] to [c, 1, 1, 1], or whichever axis of x the channels are."""
    return values.reshape([-1 if i == axis else 1 for i in range(x.ndim)])


def sum_but(x: jax.Array, axis: int) -> jax.Array:
    """Over all axes but this one → [c]; on CPU in two steps, the first of which runs along vectors."""
    if axis == 0 and x.ndim > 2:
        return jnp.sum(lax.optimization_barrier(jnp.sum(x, range(1, x.ndim - 1))), 1)
    return jnp.sum(x, [i for i in range(x.ndim) if i != axis])
