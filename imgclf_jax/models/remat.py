"""Rematerialisation: a block's inside is computed again in the backward pass, and not kept for it."""

from typing import Any

from flax import linen as nn

from imgclf_jax.core.errors import UserError


def remat(block: type[nn.Module], kind: str) -> Any:
    """A class of blocks, called as (x, train): itself if `kind` is "", or one whose gradient keeps x alone if "block".

    The parameters and results are the same (Chen et al. 2016, arXiv:1604.06174).
    """
    if kind not in ("", "block"):
        raise UserError(f"remat={kind!r}: allowed are '' (keep all) and 'block' (keep what goes into each block)")
    return nn.remat(block, static_argnums=(2,)) if kind else block
