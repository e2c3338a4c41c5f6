"""Names and digests of parameter trees."""

import hashlib
from typing import Any

import jax
import numpy as np


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """`(path, leaf)` for every leaf, the path's parts joined by `/`, sorted by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
    return sorted(named, key=lambda pair: pair[0])


def sha256(tree: Any) -> str:
    """A digest over the sorted paths, dtypes, shapes and bytes of all leaves: equal if and only if all bits are."""
    digest = hashlib.sha256()
    for path, leaf in named_leaves(tree):
        array = np.asarray(leaf)
        # NumPy's own types by their code, such as "<f4"; the others, such as bfloat16, have a name alone.
        dtype = array.dtype.name if array.dtype.kind == "V" else array.dtype.str
        digest.update(f"{path}\0{dtype}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
