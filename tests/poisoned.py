"""A device op that poisons some examples in some epochs, as a damaged file or a bad transfer would."""

import jax.numpy as jnp

from imgclf_jax.core.kinds import by_example


@by_example
def poison(key, images, ids, epochs, which=((3, 1),), value=float("nan")):
    """Multiplies the images of the (id, epoch) pairs `which` by `value`."""
    bad = jnp.zeros(ids.shape, bool)
    for example, epoch in which:
        bad |= (ids == example) & (epochs == epoch)
    return jnp.where(bad[:, None, None, None], images * jnp.float32(value), images)
