"""Names and digests of parameter trees."""

import hashlib
import zlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from imgclf_jax.core import sharding
from imgclf_jax.core.typing import Function, PyTree


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """`(path, leaf)` of every leaf, sorted by path; the parts of a path are joined by `/`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return sorted(((_name(path), leaf) for path, leaf in leaves), key=lambda pair: pair[0])


def map_named(function: Function, tree: PyTree, *others: PyTree) -> PyTree:
    """`jax.tree.map` with the leaf's path, as in `named_leaves`, as the function's first argument."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(_name(path), *leaves), tree, *others)


def _name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def sha256(tree: PyTree) -> str:
    """A SHA-256 over the sorted paths, dtypes, shapes and bytes of all leaves.

    If arrays are sharded over processes, all processes call this.
    """
    return digests((path, sharding.fetch(leaf)) for path, leaf in named_leaves(tree))[0]


def digests(named: Iterable[tuple[str, np.ndarray]]) -> tuple[str, dict[str, str]]:
    """The `sha256` of a tree with these named leaves, and a CRC-32 of each leaf as eight hexadecimal digits."""
    digest, each = hashlib.sha256(), {}
    for path, array in named:
        # NumPy's own dtypes have a code, such as "<f4"; others, such as bfloat16, only a name.
        dtype = array.dtype.name if array.dtype.kind == "V" else array.dtype.str
        header = f"{path}\0{dtype}\0{array.shape}\0".encode()
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data  # a view, hashed without the GIL
        digest.update(header)
        digest.update(content)
        each[path] = f"{zlib.crc32(content, zlib.crc32(header)):08x}"
    return digest.hexdigest(), each
