"""Names, digests and checksums of parameter trees."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """`(path, leaf)` for every leaf, the path's parts joined by `/`, sorted by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return sorted((jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves)


def sha256(tree: Any) -> str:
    """A digest over the sorted paths, dtypes, shapes and bytes of all leaves: equal if and only if all bits are."""
    digest = hashlib.sha256()
    for path, leaf in named_leaves(tree):
        array = np.asarray(leaf)
        digest.update(f"{path}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def checksum(tree: Any) -> jax.Array:
    """A uint32 over every bit of every leaf, computed on the device without a host transfer (jit it).

    Each byte is multiplied by an odd weight that depends on its place, modulo 2**32, so that any single changed
    bit changes the sum. It guards checkpoints: compressed array data on disk carries no checksum of its own.
    """
    total = jnp.uint32(0)
    for i, (_, leaf) in enumerate(named_leaves(tree)):
        leaf = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
        data = jax.lax.bitcast_convert_type(leaf, jnp.uint8).ravel().astype(jnp.uint32)
        place = jnp.arange(data.size, dtype=jnp.uint32) * jnp.uint32(2654435761) + jnp.uint32(i * 40503)
        total += jnp.sum(data * (place | jnp.uint32(1)), dtype=jnp.uint32)
    return total
