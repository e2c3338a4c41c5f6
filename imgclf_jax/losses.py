"""Losses: logits f32[b, classes] and labels i32[b] to one loss an example, f32[b].

Labels may also be distributions over the classes, f32[b, classes]. With `class_weights`, one a class, an example's loss
is multiplied by the weight of its class (of a distribution, by the expected one), as with Keras's and scikit-learn's
class weights. A batch's loss is the mean over its examples: PyTorch divides by the sum of their weights instead. The
weights 'balanced' are n / (classes * count) by the training split, so that all classes weigh the same in all.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError

Loss = Callable[[jax.Array, jax.Array], jax.Array]
Weights = Sequence[float] | None

BALANCED = "balanced"


def softmax(
    logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0, class_weights: Weights = None
) -> jax.Array:
    """Cross-entropy of the softmax against one-hot labels, in nats.

    `label_smoothing` in [0, 1) mixes the one-hot target with the uniform distribution (Szegedy et al. 2016,
    arXiv:1512.00567, section 7).
    """
    _check_smoothing("softmax", label_smoothing)
    if label_smoothing == 0.0 and labels.ndim == 1:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    else:
        targets = _smoothed(_targets(logits, labels), label_smoothing)
        losses = optax.softmax_cross_entropy(logits, targets)
    return _weighted(losses, logits, labels, class_weights)


def sigmoid(
    logits: jax.Array,
    labels: jax.Array,
    label_smoothing: float = 0.0,
    mean: bool = False,
    class_weights: Weights = None,
) -> jax.Array:
    """Binary cross-entropies of every class by itself, in nats, summed over the classes.

    The sum is that of Beyer et al. 2020 (arXiv:2006.07159); with `mean` it is divided by the number of classes, as in
    "ResNet strikes back" (Wightman et al. 2021, arXiv:2110.00476). `label_smoothing` e in [0, 1) makes the targets
    1 - e + e / classes and e / classes.
    """
    _check_smoothing("sigmoid", label_smoothing)
    targets = _smoothed(_targets(logits, labels), label_smoothing)
    entropies = optax.sigmoid_binary_cross_entropy(logits, targets)  # [b, classes]
    losses = jnp.mean(entropies, -1) if mean else jnp.sum(entropies, -1)
    return _weighted(losses, logits, labels, class_weights)


def focal(
    logits: jax.Array, labels: jax.Array, gamma: float = 2.0, alpha: float = 1.0, class_weights: Weights = None
) -> jax.Array:
    """-alpha (1 - p)**gamma log(p), p being the softmax's probability of the label.

    The focal loss of Lin et al. 2017 (arXiv:1708.02002), equation 5, for several classes that exclude each other; its
    alpha of each class is `alpha` times the class's weight. `gamma` is 0 or more; with 0 it is the cross-entropy.
    Against a distribution it is the expected loss.
    """
    if gamma < 0:
        raise UserError(f"focal(gamma={gamma}): allowed are 0 and more")
    log_p = jax.nn.log_softmax(logits)  # [b, classes]
    below_one = jnp.minimum(log_p, -jnp.finfo(log_p.dtype).tiny)  # or a power below 1 has no gradient at p = 1
    losses = -alpha * jnp.sum(_targets(logits, labels) * (-jnp.expm1(below_one)) ** gamma * log_p, -1)
    return _weighted(losses, logits, labels, class_weights)


def _check_smoothing(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise UserError(f"{name}(label_smoothing={value}): allowed are 0 to below 1")


def _targets(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """f32[b, classes]: the labels as distributions."""
    return jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype) if labels.ndim == 1 else labels


def _smoothed(targets: jax.Array, smoothing: float) -> jax.Array:
    return optax.smooth_labels(targets, smoothing) if smoothing else targets


def _weighted(losses: jax.Array, logits: jax.Array, labels: jax.Array, weights: Weights) -> jax.Array:
    if weights is None:
        return losses
    classes = logits.shape[-1]
    if isinstance(weights, str) or len(weights) != classes or min(weights) < 0:
        raise UserError(f"class_weights={weights!r}: allowed are 'balanced' and {classes} numbers from 0, one a class")
    table = jnp.asarray(weights, losses.dtype)
    return losses * (table[labels] if labels.ndim == 1 else labels @ table)


LOSSES = {"softmax": softmax, "sigmoid": sigmoid, "focal": focal}


def needs_class_counts(text: str) -> bool:
    """Whether a loss spec asks for weights by how many examples each class has: `class_weights='balanced'`."""
    call = spec.parse_one(text)
    return BALANCED in (*call.args, *call.kwargs.values())


def build(text: str, class_counts: Sequence[int] = (), class_names: Sequence[str] = ()) -> Loss:
    """The loss that a spec such as `softmax(label_smoothing=0.1)` names.

    `class_counts` says how many training examples each class has, for 'balanced'. Raises UserError for one without any.
    """
    loss = spec.bind(spec.parse_one(text), LOSSES, "loss", given=("logits", "labels"))
    if not needs_class_counts(text):
        return loss
    counts = np.asarray(class_counts or [0] * len(class_names))
    if not counts.all():
        names = [name for name, count in zip(class_names, counts, strict=True) if not count]
        raise UserError(f"loss={text!r}: no example of {', '.join(names)} is trained on, so no weight balances the "
                        "classes; give numbers as class_weights")  # fmt: skip
    weights = counts.sum() / (len(counts) * counts)
    balanced = {key: tuple(weights.tolist()) for key, value in loss.keywords.items() if value == BALANCED}
    return functools.partial(loss, **balanced)
