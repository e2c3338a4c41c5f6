"""The arrays in a checkpoint: their names, and whether they are those that a config asks for."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.core import tree


def names(folder: Path) -> set[str]:
    """The names of the arrays in a checkpoint, by Orbax's own list of them."""
    entries = json.loads((folder / "default" / "_METADATA").read_bytes())["tree_metadata"].values()
    return {"/".join(str(key["key"]) for key in entry["key_metadata"]) for entry in entries}


def find_clash(saved: Any, like: Any) -> str:
    """The first array whose dtype or shape differs; "" if there is none, or if the metadata `saved` is missing."""
    if saved is None:
        return ""
    has, wants = ({name: _describe(x) for name, x in tree.named_leaves(t)} for t in (saved, like))
    names = sorted({**has, **wants}, key=lambda name: ("/opt_state/" in name, name))  # a parameter explains most
    clashes = (name for name in names if has.get(name) != wants.get(name))
    return next((f"{n} is {has.get(n, 'absent')} in it, {wants.get(n, 'absent')} by the config" for n in clashes), "")


def _describe(array: Any) -> str:
    """Its dtype and shape as they are saved: Orbax saves random keys as the words of their data."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.eval_shape(jax.random.key_data, array)
    return f"{np.dtype(array.dtype)}{list(array.shape)}"
