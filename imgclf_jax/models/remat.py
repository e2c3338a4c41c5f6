"""Rematerialisation: a block's inside is computed again in the backward pass, and not kept for it."""

import functools
from typing import Any

from flax import linen as nn

from imgclf_jax.core.errors import UserError


def remat(block: Any, kind: str) -> Any:
    """A class of blocks, or a partial of one, called as (x, train): itself if `kind` is "".

    If it is "block", a class whose gradient keeps x alone.

    The parameters and results are the same (Chen et al. 2016, arXiv:1604.06174).
    """
    if kind not in ("", "block"):
        raise UserError(f"remat={kind!r}: allowed are '' (keep all) and 'block' (keep what goes into each block)")
    if not kind:
        return block
    if isinstance(block, functools.partial):
        return functools.partial(remat(block.func, kind), *block.args, **block.keywords)
    return nn.remat(block, static_argnums=(2,))
