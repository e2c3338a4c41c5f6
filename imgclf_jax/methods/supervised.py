"""Supervised learning: the loss of the key `loss` between the logits and the labels. The default method."""

from collections.abc import Callable
from typing import Any

import jax

from imgclf_jax.losses import at_least_float32
from imgclf_jax.methods import Batch, Loss, Method, Problem


def supervised(problem: Problem) -> Method:
    """The loss of the logits, as the keys `loss` and `mix` say."""
    return from_logits(problem.supervised)


def from_logits(losses: Callable[[jax.Array, Batch], jax.Array]) -> Method:
    """The method whose losses f32[b] are a function of the logits f32[b, classes] and the batch."""

    def loss(model: Any, batch: Batch, fixed: Any) -> Loss:
        logits = at_least_float32(model(batch["image"], train=True))
        return Loss(losses(logits, batch), logits)

    return Method(loss)
