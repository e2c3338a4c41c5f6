"""Per-example gradient clipping."""

import jax
import jax.numpy as jnp
import optax

from imgclf_jax.core import rng, tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Batch, ModelState, Params
from imgclf_jax.methods.gradients import Gradient, GradientFunction, LossAndGrads


def clip_per_example(gradient: Gradient, max_norm: float = 1.0) -> GradientFunction:
    """The mean of the examples' gradients, each scaled to a norm of at most `max_norm`, over all parameters.

    The clipping of DP-SGD (Abadi et al. 2016, arXiv:1607.00133, algorithm 1), without its noise. Each example has its
    own key, and so its own dropout mask; the loss, the metrics and the new model state are those of the whole batch.
    It holds the gradients of all examples at once. Raises UserError for a `max_norm` of 0 or less, for a model with
    batch statistics, which depend on other examples, for batches with arrays of another length, and with `accumulate`.
    """
    if not max_norm > 0:
        raise UserError(f"gradient: clip_per_example(max_norm={max_norm}): must be above 0")

    def clipped(params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> LossAndGrads:
        if "batch_stats" in model_state:
            raise UserError("gradient: clip_per_example needs a model without batch statistics: norm='group_norm'")
        b = len(batch["image"])
        if wrong := [name for name, x in tree.named_leaves(batch) if jnp.shape(x)[:1] != (b,)]:
            raise UserError(f"gradient: clip_per_example needs arrays of one entry per example; {wrong[0]!r} is none")

        def one(example: Batch, key: jax.Array) -> Params:
            return gradient(params, model_state, jax.tree.map(lambda x: x[None], example), key)[1]

        out, _ = gradient(params, model_state, batch, key)  # XLA drops this gradient
        each = jax.vmap(one)(batch, jax.random.split(rng.fold(key, "clip_per_example"), b))  # [b, …]
        scale = jnp.minimum(1, max_norm / jax.vmap(optax.tree.norm)(each))  # [b]; 1 for a zero gradient
        return out, jax.tree.map(lambda g: jnp.tensordot(scale.astype(g.dtype), g, 1) / b, each)

    return clipped
