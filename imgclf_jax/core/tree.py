"""Names and digests of parameter trees."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from imgclf_jax.core import sharding


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """`(path, leaf)` for every leaf, the path's parts joined by `/`, sorted by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return sorted(((_name(path), leaf) for path, leaf in leaves), key=lambda pair: pair[0])


def map_named(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`jax.tree.map` with the leaf's path, as in `named_leaves`, as the function's first argument."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(_name(path), *leaves), tree, *others)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def replace(tree: Any, named: Mapping[str, Any]) -> Any:
    """`tree` with the leaves that `named` holds, by the paths of `named_leaves`, in place of its own."""
    return map_named(named.get, tree)


def sha256(tree: Any) -> str:
    """A digest over the sorted paths, dtypes, shapes and bytes of all leaves: equal if and only if all bits are.

    Of global arrays, parts of which other processes have, all processes call this.
    """
    digest = hashlib.sha256()
    for path, leaf in named_leaves(tree):
        array = sharding.fetch(leaf)
        # NumPy's own types by their code, such as "<f4"; the others, such as bfloat16, have a name alone.
        dtype = array.dtype.name if array.dtype.kind == "V" else array.dtype.str
        digest.update(f"{path}\0{dtype}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
