"""Losses: logits f32[b, classes] and labels i32[b] to one loss an example, f32[b]."""

from collections.abc import Callable

import jax
import optax

from imgclf_jax import spec
from imgclf_jax.errors import UserError

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def softmax(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy of the softmax against one-hot labels, in nats.

    `label_smoothing` in [0, 1) mixes the one-hot target with the uniform distribution (Szegedy et al. 2016,
    arXiv:1512.00567, section 7).
    """
    if not 0 <= label_smoothing < 1:
        raise UserError(f"softmax(label_smoothing={label_smoothing}): allowed are 0 to below 1")
    if label_smoothing == 0.0:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, label_smoothing))


LOSSES = {"softmax": softmax}


def build(text: str) -> Loss:
    """The loss that a spec such as `softmax(label_smoothing=0.1)` names."""
    return spec.bind(spec.parse_one(text), LOSSES, "loss", given=("logits", "labels"))
