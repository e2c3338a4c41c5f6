"""Losses: logits f32[b, classes] and labels i32[b] to one loss an example, f32[b].

Labels may also be distributions over the classes, f32[b, classes].

`class_weights` holds one number for each class. It multiplies the loss of the examples of this class, as in Keras and
scikit-learn; for a distribution the expected weight does. The loss of a batch is the mean over its examples, where
PyTorch divides by the sum of their weights. The weights 'balanced' are n / (classes * count), by the counts of the
training split: then each class has the same weight in total.

A loss also decides how logits become probabilities, by its `Link`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from imgclf_jax.core import platform, spec
from imgclf_jax.core.errors import UserError

Loss = Callable[[jax.Array, jax.Array], jax.Array]
Weights = Sequence[float] | None

BALANCED = "balanced"


class Link(NamedTuple):
    """How logits and probabilities belong together, as the link function does in a generalized linear model.

    `probabilities(logits f32[..., classes])` is f32[..., classes]. `ensemble(logits f32[n, ..., classes])` is f32[...,
    classes]: the logits whose probabilities are the mean of the probabilities of the n models. `nll(logits f32[b,
    classes], labels i32[b])` is f32[b]: the negative log-likelihood of the labels under the probabilities, in nats.
    """

    probabilities: Callable[[jax.Array], jax.Array]
    ensemble: Callable[[jax.Array], jax.Array]
    nll: Callable[[jax.Array, jax.Array], jax.Array]


def _softmax_ensemble(logits: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), 0) - jnp.log(jnp.asarray(len(logits), logits.dtype))


def _sigmoid_ensemble(logits: jax.Array) -> jax.Array:
    """log(mean p) - log(mean (1 - p)), which needs no p that may round to 0 or 1."""
    return jax.nn.logsumexp(jax.nn.log_sigmoid(logits), 0) - jax.nn.logsumexp(jax.nn.log_sigmoid(-logits), 0)


def _is_label(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """bool[b, classes]: the labels i32[b] as one-hot rows."""
    return labels[:, None] == jnp.arange(logits.shape[-1], dtype=labels.dtype)


def _softmax_nll(logits: jax.Array, labels: jax.Array) -> jax.Array:
    if platform.current() == "cpu":
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    # Elsewhere without an index, whose gradient is a scatter: deterministic kernels of GPUs sort for one.
    own = jnp.sum(jnp.where(_is_label(logits, labels), logits, jnp.zeros((), logits.dtype)), -1)
    return jax.nn.logsumexp(logits, -1) - own


def _sigmoid_nll(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.sum(jax.nn.softplus(jnp.where(_is_label(logits, labels), -logits, logits)), -1)


# The classes exclude each other: probabilities add up to 1.
SOFTMAX = Link(jax.nn.softmax, _softmax_ensemble, _softmax_nll)
# Each class is true or false by itself: the likelihood is the product over the classes.
SIGMOID = Link(jax.nn.sigmoid, _sigmoid_ensemble, _sigmoid_nll)


def with_link[F: Callable[..., jax.Array]](link: Link) -> Callable[[F], F]:
    """A decorator that declares the link of a loss; a loss without it has SOFTMAX.

    @with_link(SIGMOID)
    def my_loss(logits, labels): ...
    """

    def declare(loss: F) -> F:
        loss.link = link  # type: ignore[attr-defined]
        return loss

    return declare


def link_of(loss: Loss | str) -> Link:
    """The link of a loss, or of the loss that a spec names. Raises UserError for a spec that names no loss."""
    if isinstance(loss, str):
        loss = spec.lookup(spec.parse_one(loss), LOSSES, "loss")
    while isinstance(loss, functools.partial):
        loss = loss.func
    link: Link = getattr(loss, "link", SOFTMAX)
    return link


def softmax(
    logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0, class_weights: Weights = None
) -> jax.Array:
    """Cross-entropy of the softmax against one-hot labels, in nats.

    `label_smoothing` in [0, 1) mixes the one-hot target with the uniform distribution (Szegedy et al. 2016,
    arXiv:1512.00567, section 7).
    """
    _check_smoothing("softmax", label_smoothing)
    if label_smoothing == 0.0 and labels.ndim == 1:
        losses = _softmax_nll(logits, labels)
    else:
        targets = _smoothed(_targets(logits, labels), label_smoothing)
        losses = optax.softmax_cross_entropy(logits, targets)
    return _weighted(losses, logits, labels, class_weights)


@with_link(SIGMOID)
def sigmoid(
    logits: jax.Array,
    labels: jax.Array,
    label_smoothing: float = 0.0,
    mean: bool = False,
    class_weights: Weights = None,
) -> jax.Array:
    """Binary cross-entropy of each class by itself, in nats, summed over the classes.

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
    """-alpha (1 - p)**gamma log(p), where p is the softmax's probability of the label.

    The focal loss of Lin et al. 2017 (arXiv:1708.02002), equation 5, for classes that exclude each other. The paper's
    alpha of a class is `alpha` times the class's weight. `gamma` is 0 or more; 0 gives the cross-entropy. For a
    distribution it is the expected loss.
    """
    if gamma < 0:
        raise UserError(f"focal(gamma={gamma}): allowed are 0 and more")
    log_p = jax.nn.log_softmax(logits)  # [b, classes]
    below_one = jnp.minimum(log_p, -jnp.finfo(log_p.dtype).tiny)  # at p = 1 a power below 1 has no finite gradient
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
    """Whether a loss spec needs to know how many examples each class has, as `class_weights='balanced'` does."""
    call = spec.parse_one(text)
    return BALANCED in (*call.args, *call.kwargs.values())


def build(text: str, class_counts: Sequence[int] = (), class_names: Sequence[str] = ()) -> Loss:
    """The loss that a spec such as `softmax(label_smoothing=0.1)` names.

    `class_counts` says how many training examples each class has, for 'balanced'. Raises UserError for a spec that
    names no loss, and for 'balanced' if a class has no training example.
    """
    loss = spec.bind(spec.parse_one(text), LOSSES, "loss", given=("logits", "labels"))
    if not needs_class_counts(text):
        return loss
    counts = np.asarray(class_counts or [0] * len(class_names))
    if not counts.all():
        names = [name for name, count in zip(class_names, counts, strict=True) if not count]
        raise UserError(f"loss={text!r}: no example of {', '.join(names)} is trained on, so no weight can balance "
                        "the classes; give numbers as class_weights")  # fmt: skip
    weights = counts.sum() / (len(counts) * counts)
    balanced = {key: tuple(weights.tolist()) for key, value in loss.keywords.items() if value == BALANCED}
    return functools.partial(loss, **balanced)
