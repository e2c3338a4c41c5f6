"""Supervised learning, the default method: the config's `loss` between logits and labels."""

from collections.abc import Callable
from typing import Any

import jax

from imgclf_jax.core import dtypes
from imgclf_jax.core.typing import PyTree
from imgclf_jax.methods import Batch, Loss, Method, Problem


def supervised(problem: Problem) -> Method:
    """Supervised learning with the config's `loss` and `mix`."""
    return from_logits(problem.supervised)


def from_logits(losses: Callable[[jax.Array, Batch], jax.Array]) -> Method:
    """A method from `losses(logits f32[b, classes], batch) -> f32[b]`."""

    def loss(model: Any, batch: Batch, fixed: PyTree) -> Loss:
        logits = dtypes.upcast(model(batch["image"], train=True))
        return Loss(losses(logits, batch), logits)

    return Method(loss)
