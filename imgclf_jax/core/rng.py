"""Random keys and generators as functions of (seed, name, step), so no RNG state is stored.

Every draw names its stream, so adding one, such as a new augmentation, changes no other.
"""

import zlib

import jax
import numpy as np


def name_hash(name: str) -> int:
    """A 32-bit hash of a stream's name (CRC-32), stable across processes and versions."""
    return zlib.crc32(name.encode())


def key(seed: jax.Array | int, name: str, step: jax.Array | int = 0) -> jax.Array:
    """The JAX key of stream `name` at `step`: `fold_in(fold_in(key(seed), name), step)`.

    `seed` and `step` may be traced integers, so one compiled step serves every seed.
    """
    return fold(jax.random.key(seed), name, step)


def fold(key: jax.Array, name: str, number: jax.Array | int = 0) -> jax.Array:
    """The key of stream `name` below another key: `fold_in(fold_in(key, name), number)`."""
    return jax.random.fold_in(jax.random.fold_in(key, name_hash(name)), number)


def init_streams(key: jax.Array) -> dict[str, jax.Array]:
    """The rng streams for initializing a model: linen modules draw from "params", nnx modules also from "default".

    For a missing stream, such as that of `make_rng("noise")`, linen falls back to "params" and nnx to "default".
    """
    return {"params": key, "default": fold(key, "default")}


def generator(seed: int, name: str, position: int) -> np.random.Generator:
    """The NumPy generator of one host-side draw, such as the crop of the example at a global stream position.

    Philox is counter-based: any position costs the same, and no two (seed, name, position) share a stream.
    """
    # NumPy would convert a list with a number above 2**63 to float64.
    key = np.array([(seed << 32) | name_hash(name), position], np.uint64)
    return np.random.Generator(np.random.Philox(key=key))
