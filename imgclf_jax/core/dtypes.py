"""The dtype that statistics, sums and losses are computed in."""

import jax
import jax.numpy as jnp


def upcast(x: jax.Array) -> jax.Array:
    """Casts to float32, in which statistics, sums, losses and probabilities are computed; float64 stays float64."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)
