"""Losses: functions of logits f32[b, k] and labels i32[b] or targets f32[b, k] to one loss per example, f32[b].

A loss declares its `Link`, from logits to probabilities. Metrics, mixing and the tools follow the link and the data.

`class_weights`, one number per class, multiply the losses of the examples of each class, as in Keras and scikit-learn;
they need labels. The batch loss is the mean over examples, whereas PyTorch divides by the sum of the labels' weights.
The weights 'balanced' are n / (classes * count) by the class counts of the training split.
"""

import enum
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
_SUM_TOLERANCE = 1e-3  # of a soft target's sum


class Task(enum.Enum):
    """What a model predicts, given by its loss and its data."""

    CLASSES = "classes"  # one class: labels i32[b]
    SOFT = "soft"  # one class, as a distribution: targets f32[b, classes] whose rows sum to 1
    MULTILABEL = "multilabel"  # any number of classes: targets f32[b, classes] in [0, 1]


class Link(NamedTuple):
    """The map between logits and probabilities, as the link function of a generalized linear model.

    - `probabilities(logits f32[..., k])` returns f32[..., k].
    - `ensemble(logits f32[n, ..., k])` returns f32[..., k], the logits of the mean probabilities of n models.
    - `nll(logits f32[b, k], labels i32[b] or targets f32[b, k])` returns f32[b], the negative log-likelihood in nats.
    - `log_odds(logits f32[..., k])` returns f32[..., k], log p - log(1 - p) of each probability p. It orders examples
      as p does, also where float32 rounds p to 0 or 1.
    """

    probabilities: Callable[[jax.Array], jax.Array]
    ensemble: Callable[[jax.Array], jax.Array]
    nll: Callable[[jax.Array, jax.Array], jax.Array]
    log_odds: Callable[[jax.Array], jax.Array]


def _softmax_ensemble(logits: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), 0) - jnp.log(jnp.asarray(len(logits), logits.dtype))


def _sigmoid_ensemble(logits: jax.Array) -> jax.Array:
    """log(mean p) - log(mean (1 - p)), from log-probabilities, so no p rounds to 0 or 1."""
    return jax.nn.logsumexp(jax.nn.log_sigmoid(logits), 0) - jax.nn.logsumexp(jax.nn.log_sigmoid(-logits), 0)


def _softmax_nll(logits: jax.Array, labels: jax.Array) -> jax.Array:
    if labels.ndim > 1:
        return optax.softmax_cross_entropy(logits, labels)
    if platform.current() == "cpu":
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    # Elsewhere a masked sum: the gradient of indexing is a scatter, for which deterministic GPU kernels sort.
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    label_logits = jnp.sum(jnp.where(is_label, logits, jnp.zeros((), logits.dtype)), -1)
    return jax.nn.logsumexp(logits, -1) - label_logits


def _sigmoid_nll(logits: jax.Array, labels: jax.Array) -> jax.Array:
    if labels.ndim > 1:
        return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, labels), -1)
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    return jnp.sum(jax.nn.softplus(jnp.where(is_label, -logits, logits)), -1)


def _softmax_log_odds(logits: jax.Array) -> jax.Array:
    """Each logit minus the logsumexp of the others.

    The greatest logit is left out of every sum, because float32 would round the others away beside it.
    """
    is_top = jnp.argmax(logits, -1, keepdims=True) == jnp.arange(logits.shape[-1])
    below_top = logits - jnp.max(logits, -1, keepdims=True)
    rest = jnp.where(is_top, 0.0, jnp.exp(below_top))
    others = jax.nn.logsumexp(jnp.where(is_top, -jnp.inf, logits), -1, keepdims=True)
    return jnp.where(is_top, logits - others, below_top - jnp.log1p(jnp.sum(rest, -1, keepdims=True) - rest))


SOFTMAX = Link(jax.nn.softmax, _softmax_ensemble, _softmax_nll, _softmax_log_odds)  # mutually exclusive classes
SIGMOID = Link(jax.nn.sigmoid, _sigmoid_ensemble, _sigmoid_nll, lambda logits: logits)  # independent classes


def with_link[F: Callable[..., jax.Array]](link: Link) -> Callable[[F], F]:
    """Decorator that declares the link of a loss, which is SOFTMAX by default.

    @with_link(SIGMOID)
    def my_loss(logits, labels): ...
    """

    def declare(loss: F) -> F:
        loss.link = link  # type: ignore[attr-defined]
        return loss

    return declare


def link_of(loss: Loss | str) -> Link:
    """The link of a loss, given as a function or a spec. Raises UserError for a spec that names no loss."""
    function = spec.lookup(spec.parse_one(loss), LOSSES, "loss") if isinstance(loss, str) else loss
    link: Link = spec.declared(function, "link", SOFTMAX)
    return link


def check_targets(text: str, task: Task, targets: np.ndarray, name: Callable[[int], str] = "example {}".format) -> None:
    """Raises UserError for finite targets f32[n, k] that do not fit the loss `text`; `name` names a row's example."""
    sums, outside = targets.sum(1, dtype=np.float64), ((targets < 0) | (targets > 1)).any(1)
    unequal = (np.abs(sums - 1) > _SUM_TOLERANCE) & (task is Task.SOFT)
    if (wrong := np.flatnonzero(outside | unequal)).size:
        i, more = int(wrong[0]), " and sum to 1: divide each row by its sum, or use 'sigmoid'" * (task is Task.SOFT)
        raise UserError(f"loss={text!r}: {name(i)} has the target {targets[i][:5].tolist()}, with the sum {sums[i]:g}; "
                        f"targets must be in [0, 1]{more}")  # fmt: skip


def softmax(
    logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0, class_weights: Weights = None
) -> jax.Array:
    """Softmax cross-entropy, in nats.

    `label_smoothing` in [0, 1) mixes in the uniform distribution (Szegedy et al. 2016, arXiv:1512.00567, section 7).
    """
    targets = _smoothed_targets(logits, labels, label_smoothing) if label_smoothing else labels
    return _class_weighted(_softmax_nll(logits, targets), logits, labels, class_weights)


@with_link(SIGMOID)
def sigmoid(
    logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0, mean: bool = False,
    class_weights: Weights = None, positive_weights: Weights = None,
) -> jax.Array:  # fmt: skip
    """Binary cross-entropy, in nats, summed over the classes (Beyer et al. 2020, arXiv:2006.07159).

    Targets f32[b, classes] in [0, 1] may have any number of true classes.

    - `mean` divides by the number of classes ("ResNet strikes back", Wightman et al. 2021, arXiv:2110.00476).
    - `label_smoothing` e in [0, 1) makes the targets 1 - e + e / classes and e / classes.
    - `positive_weights`, one number per class, multiply the loss of true classes, as PyTorch's `pos_weight` does.
    """
    targets = _smoothed_targets(logits, labels, label_smoothing)
    entropies = optax.sigmoid_binary_cross_entropy(logits, targets)  # [b, classes]
    if positive_weights is not None:
        weights = _check_weights("positive_weights", positive_weights, logits)
        entropies += (weights - 1) * targets * jax.nn.softplus(-logits)
    losses = jnp.mean(entropies, -1) if mean else jnp.sum(entropies, -1)
    return _class_weighted(losses, logits, labels, class_weights)


def focal(
    logits: jax.Array, labels: jax.Array, gamma: float = 2.0, alpha: float = 1.0, class_weights: Weights = None
) -> jax.Array:
    """The focal loss -alpha (1 - p)**gamma log(p), where p is the softmax probability of the label.

    Lin et al. 2017 (arXiv:1708.02002), equation 5, for mutually exclusive classes. The paper's alpha of a class is
    `alpha` times its class weight. `gamma` is 0 or more; 0 is the cross-entropy. A soft target gets the expected loss.
    """
    log_p = jax.nn.log_softmax(logits)  # [b, classes]
    below_one = jnp.minimum(log_p, -jnp.finfo(log_p.dtype).tiny)  # for gamma < 1 the gradient at p = 1 is infinite
    factor = (-jnp.expm1(below_one)) ** gamma  # [b, classes]
    losses = -alpha * jnp.sum(_smoothed_targets(logits, labels, 0.0) * factor * log_p, -1)
    return _class_weighted(losses, logits, labels, class_weights)


def _smoothed_targets(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """f32[b, classes]: one-hot labels, or the targets themselves, smoothed."""
    if not 0 <= smoothing < 1:
        raise UserError(f"label_smoothing={smoothing}: allowed are 0 to below 1")
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype) if labels.ndim == 1 else labels
    return optax.smooth_labels(targets, smoothing) if smoothing else targets


def _class_weighted(losses: jax.Array, logits: jax.Array, labels: jax.Array, weights: Weights) -> jax.Array:
    """The losses f32[b] times the weight of each label i32[b]. Raises UserError for targets."""
    if weights is None:
        return losses
    if labels.ndim > 1:
        raise UserError("class_weights needs one label per example, not targets; for these use positive_weights")
    return losses * _check_weights("class_weights", weights, logits)[labels]


def _check_weights(name: str, weights: Sequence[float], logits: jax.Array) -> jax.Array:
    """f32[classes]: the weights. Raises UserError unless there is one of 0 or more per class, and one above 0."""
    classes = logits.shape[-1]
    if isinstance(weights, str) or len(weights) != classes or min(weights) < 0 or not any(weights):
        raise UserError(f"{name}={weights!r}: allowed are {classes} numbers of 0 or more, one per class, not all 0")
    return jnp.asarray(weights, logits.dtype)


LOSSES = {"softmax": softmax, "sigmoid": sigmoid, "focal": focal}


def needs_class_counts(text: str) -> bool:
    """Whether a loss spec needs the number of examples per class, as `class_weights='balanced'` does."""
    call = spec.parse_one(text)
    return BALANCED in (*call.args, *call.kwargs.values())


def build(text: str, class_counts: Sequence[int] = (), class_names: Sequence[str] = ()) -> Loss:
    """Returns the loss that a spec such as `softmax(label_smoothing=0.1)` names.

    `class_counts`, for 'balanced', are the training examples per class. Raises UserError for a spec that names no loss,
    for 'balanced' if a class has no training example, and when called, unless the loss returns one number per example.
    """
    loss = spec.bind(spec.parse_one(text), LOSSES, "loss", leading=("logits", "labels"))
    if loss.keywords.get("class_weights") == BALANCED:
        counts = np.asarray(class_counts or [0] * len(class_names))
        if not counts.all():
            names = [name for name, count in zip(class_names, counts, strict=True) if not count]
            raise UserError(f"loss={text!r}: the training split has no example of {', '.join(names)}, so no weight can "
                            "balance the classes; write numbers as class_weights")  # fmt: skip
        loss = functools.partial(loss, class_weights=tuple((counts.sum() / (len(counts) * counts)).tolist()))

    @functools.wraps(loss)
    def checked(logits: jax.Array, labels: jax.Array) -> jax.Array:
        values: jax.Array = loss(logits, labels)  # other shapes would be broadcast, and integers have no gradient
        if getattr(values, "shape", None) != logits.shape[:1] or not jnp.issubdtype(values.dtype, jnp.floating):
            found = jax.typeof(values).str_short() if isinstance(values, jax.Array) else type(values).__name__
            raise UserError(f"loss={text!r} returns {found} for logits {logits.shape}; return a float for each example")
        return values

    return checked
