"""A network and a gradient function in which a test flips one bit: of an activation, of its gradient or a parameter's.

FLIP = (site, bit, place) is what goes wrong in the computations from now on; None: nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from imgclf_jax.core.typing import Array

FLIP: list[tuple[str, int, int] | None] = [None]
ACTIVATIONS = ("input", "hidden", "features")  # f32[b, …]; their gradients have the same names, with a d before
SITES = [*ACTIVATIONS, *(f"d {name}" for name in ACTIVATIONS)]  # and the parameters' gradients, by path


def through(site: str, x: jax.Array) -> jax.Array:
    """The array, as FLIP leaves it."""
    kind = {2: np.uint16, 4: np.uint32}[x.dtype.itemsize]

    def mask(first: Array) -> np.ndarray:
        bits = np.zeros(x.shape, kind)
        if FLIP[0] is not None and FLIP[0][0] == site:
            _, bit, place = FLIP[0]
            bits.reshape(-1)[place % bits.size] = kind(1) << kind(bit % (8 * bits.itemsize))
        return bits

    bits = jax.lax.bitcast_convert_type(x, kind)
    asked = jax.pure_callback(mask, jax.ShapeDtypeStruct(x.shape, kind), bits.reshape(-1)[:1])
    return jax.lax.bitcast_convert_type(bits ^ asked, x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def faulty(site: str, x: jax.Array) -> jax.Array:
    """An activation; it and its gradient may lose a bit."""
    return through(site, x)


faulty.defvjp(lambda site, x: (through(site, x), None), lambda site, _, gradient: (through(f"d {site}", gradient),))


class Net(nn.Module):
    """Two hidden layers, with batch statistics: [b, h, w, c] → [b, d]."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = faulty("input", x.reshape(len(x), -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(16)(x))
        x = faulty("hidden", nn.relu(x))
        return faulty("features", nn.tanh(nn.Dense(8)(x)))


def faulty_gradient(gradient: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of each parameter may lose a bit."""

    def function(*args: Any) -> Any:
        values, grads = gradient(*args)
        named = jax.tree_util.tree_map_with_path(lambda path, g: through(jax.tree_util.keystr(path), g), grads)
        return values, named

    return function
