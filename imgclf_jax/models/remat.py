"""Rematerialization: recomputes a block's activations in the backward pass instead of storing them."""

import functools

from flax import linen as nn

from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import ModuleDef


def remat(block: ModuleDef, kind: str) -> ModuleDef:
    """Wraps a block class, or a partial of one, called as (x, train) (Chen et al. 2016, arXiv:1604.06174).

    With `kind` "block" the backward pass stores only x and recomputes the rest; with "" the block is unchanged.
    Parameters and results are the same. Raises UserError for any other `kind`.
    """
    if kind not in ("", "block"):
        raise UserError(f"remat={kind!r}: allowed are '' (store all activations) and 'block' (store block inputs only)")
    if not kind:
        return block
    if isinstance(block, functools.partial):
        return functools.partial(remat(block.func, kind), *block.args, **block.keywords)
    return nn.remat(block, static_argnums=(2,))
