"""Supervised learning: the loss of the key `loss` between the logits and the labels. The default method."""

from typing import Any

import jax.numpy as jnp

from imgclf_jax.methods import Batch, Loss, Method, Problem


def supervised(problem: Problem) -> Method:
    """The loss of the logits, as the keys `loss` and `mix` say."""

    def loss(model: Any, batch: Batch, fixed: Any) -> Loss:
        logits = model(batch["image"], train=True)
        logits = logits if logits.dtype == jnp.float64 else logits.astype(jnp.float32)  # [b, classes]
        return Loss(problem.supervised(logits, batch), logits)

    return Method(loss)
