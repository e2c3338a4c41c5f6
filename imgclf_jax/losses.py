"""Losses: logits f32[b, k] and labels i32[b], or targets f32[b, k], to one loss an example, f32[b].

A loss declares its tasks (see `Task`), and its `Link`: how logits become probabilities or values. Metrics, mixing and
the tools choose by the task.

`class_weights` holds one number for each class. It multiplies the loss of the examples of this class, as in Keras and
scikit-learn; for a distribution the expected weight does. The loss of a batch is the mean over its examples, where
PyTorch divides by the sum of their weights. The weights 'balanced' are n / (classes * count), by the counts of the
training split: then each class has the same weight in total.
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
_SUM_TOLERANCE = 1e-3  # of a distribution's sum


class Task(enum.Enum):
    """What a model predicts, by the loss it is trained with and by what its data hold."""

    CLASSES = "classes"  # one class, from labels i32[b]
    SOFT = "soft"  # one class, from distributions over the classes: targets f32[b, classes] whose rows add up to 1
    MULTILABEL = "multilabel"  # any number of classes, each true or false: targets f32[b, classes] in [0, 1]
    REGRESSION = "regression"  # numbers: targets f32[b, outputs]


def at_least_float32(x: jax.Array) -> jax.Array:
    """`x` in float32, or in float64 if it is: what losses and probabilities are computed in."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


class Link(NamedTuple):
    """How logits and probabilities belong together, as the link function does in a generalized linear model.

    `probabilities(logits f32[..., k])` is f32[..., k]; of a regression, the predicted values. `ensemble(logits
    f32[n, ..., k])` is f32[..., k]: the logits whose probabilities are the mean of the probabilities of the n models.
    `nll(logits f32[b, k], labels i32[b] or targets f32[b, k])` is f32[b]: the negative log-likelihood under the
    probabilities, in nats; None where a loss has no likelihood.
    """

    probabilities: Callable[[jax.Array], jax.Array]
    ensemble: Callable[[jax.Array], jax.Array]
    nll: Callable[[jax.Array, jax.Array], jax.Array] | None = None


def _softmax_ensemble(logits: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), 0) - jnp.log(jnp.asarray(len(logits), logits.dtype))


def _sigmoid_ensemble(logits: jax.Array) -> jax.Array:
    """log(mean p) - log(mean (1 - p)), which needs no p that may round to 0 or 1."""
    return jax.nn.logsumexp(jax.nn.log_sigmoid(logits), 0) - jax.nn.logsumexp(jax.nn.log_sigmoid(-logits), 0)


def _is_label(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """bool[b, classes]: the labels i32[b] as one-hot rows."""
    return labels[:, None] == jnp.arange(logits.shape[-1], dtype=labels.dtype)


def _softmax_nll(logits: jax.Array, labels: jax.Array) -> jax.Array:
    if labels.ndim > 1:
        return optax.softmax_cross_entropy(logits, labels)
    if platform.current() == "cpu":
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    # Elsewhere without an index, whose gradient is a scatter: deterministic kernels of GPUs sort for one.
    own = jnp.sum(jnp.where(_is_label(logits, labels), logits, jnp.zeros((), logits.dtype)), -1)
    return jax.nn.logsumexp(logits, -1) - own


def _sigmoid_nll(logits: jax.Array, labels: jax.Array) -> jax.Array:
    if labels.ndim > 1:
        return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, labels), -1)
    return jnp.sum(jax.nn.softplus(jnp.where(_is_label(logits, labels), -logits, logits)), -1)


# The classes exclude each other: probabilities add up to 1.
SOFTMAX = Link(jax.nn.softmax, _softmax_ensemble, _softmax_nll)
# Each class is true or false by itself: the likelihood is the product over the classes.
SIGMOID = Link(jax.nn.sigmoid, _sigmoid_ensemble, _sigmoid_nll)
# The logits are the predicted values, and an ensemble predicts their mean.
IDENTITY = Link(lambda logits: logits, lambda logits: jnp.mean(logits, 0))


def with_link[F: Callable[..., jax.Array]](link: Link) -> Callable[[F], F]:
    """A decorator that declares the link of a loss. Without it, a regression has IDENTITY and other losses SOFTMAX.

    @with_link(SIGMOID)
    def my_loss(logits, labels): ...
    """

    def declare(loss: F) -> F:
        loss.link = link  # type: ignore[attr-defined]
        return loss

    return declare


def with_tasks[F: Callable[..., jax.Array]](*tasks: Task) -> Callable[[F], F]:
    """A decorator that declares what a loss trains: CLASSES for labels, and at most one of the others for targets.

    Without it the link decides: SIGMOID trains CLASSES and MULTILABEL, IDENTITY REGRESSION, others CLASSES and SOFT.

    @with_tasks(Task.REGRESSION)
    def my_loss(values, targets): ...
    """
    if len(set(tasks) - {Task.CLASSES}) > 1 or not tasks:
        raise ValueError(f"with_tasks{tasks}: a loss trains CLASSES, or one task with targets, or both")

    def declare(loss: F) -> F:
        loss.tasks = tasks  # type: ignore[attr-defined]
        return loss

    return declare


def link_of(loss: Loss | str) -> Link:
    """The link of a loss, or of the loss that a spec names. Raises UserError for a spec that names no loss."""
    function = _declaring(loss)
    tasks = getattr(function, "tasks", ())
    default = IDENTITY if Task.REGRESSION in tasks else SIGMOID if Task.MULTILABEL in tasks else SOFTMAX
    link: Link = getattr(function, "link", default)
    return link


def tasks_of(loss: Loss | str) -> tuple[Task, ...]:
    """The tasks that a loss, or the loss that a spec names, declares or has by its link; see `with_tasks`."""
    function, link = _declaring(loss), link_of(loss)
    by_link = {SIGMOID: (Task.CLASSES, Task.MULTILABEL), IDENTITY: (Task.REGRESSION,)}
    tasks: tuple[Task, ...] = getattr(function, "tasks", by_link.get(link, (Task.CLASSES, Task.SOFT)))
    return tasks


def _declaring(loss: Loss | str) -> Loss:
    """The function whose attributes declare the link and the tasks."""
    if isinstance(loss, str):
        loss = spec.lookup(spec.parse_one(loss), LOSSES, "loss")
    while isinstance(loss, functools.partial):
        loss = loss.func
    return loss


def task_of(loss: Loss | str, has_targets: bool) -> Task:
    """The task of a loss, by itself or as a spec, on data with targets or with labels.

    Raises UserError where the loss does not train on such data.
    """
    name = loss if isinstance(loss, str) else getattr(_declaring(loss), "__name__", "loss")
    tasks = tasks_of(loss)
    if has_targets:
        found = [task for task in tasks if task is not Task.CLASSES]
        if not found:
            raise UserError(f"loss={name!r} trains on class labels, and these data have targets: use 'softmax' for "
                            "distributions, 'sigmoid' for several labels, 'mse' for numbers")  # fmt: skip
        if isinstance(loss, str):
            _check_for_targets(loss, found[0])
        return found[0]
    if Task.CLASSES not in tasks:
        what = "numbers" if Task.REGRESSION in tasks else "targets"
        raise UserError(f"loss={name!r} trains on {what}, and these data have class labels: use 'softmax' or "
                        "'sigmoid', or a source with targets")  # fmt: skip
    return Task.CLASSES


def _check_for_targets(text: str, task: Task) -> None:
    call = spec.parse_one(text)
    if needs_class_counts(text):
        raise UserError(f"loss={text!r}: 'balanced' counts labels, and these data have targets; give numbers")
    if task is Task.MULTILABEL and call.name == "sigmoid" and call.kwargs.get("class_weights") is not None:
        raise UserError(f"loss={text!r}: class_weights weighs examples by their one label; for several labels use "
                        "positive_weights, one number a class")  # fmt: skip


def check_targets(text: str, task: Task, targets: np.ndarray) -> None:
    """Raises UserError for finite targets f32[n, k] that the loss spec `text` cannot have as its task."""
    outside = np.flatnonzero(((targets < 0) | (targets > 1)).any(1))
    if task in (Task.SOFT, Task.MULTILABEL) and outside.size:
        raise UserError(f"loss={text!r}: example {outside[0]} has the target {_row(targets[outside[0]])}, outside of "
                        "[0, 1]; for numbers use 'mse', 'mae' or 'huber'")  # fmt: skip
    sums = targets.sum(1, dtype=np.float64)
    wrong = np.flatnonzero(np.abs(sums - 1) > _SUM_TOLERANCE)
    if task is Task.SOFT and wrong.size:
        found = f"loss={text!r}: the target of example {wrong[0]} adds up to {sums[wrong[0]]:g} and not to 1"
        if np.isin(targets, (0, 1)).all():
            raise UserError(f"{found}; for columns that are 0 or 1 each by itself use 'sigmoid'")
        raise UserError(f"{found}; divide each row by its sum, or use 'sigmoid' for independent probabilities")


def _row(target: np.ndarray) -> str:
    return f"[{', '.join(f'{x:g}' for x in target[:5])}{', …' if len(target) > 5 else ''}]"


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
    positive_weights: Weights = None,
) -> jax.Array:
    """Binary cross-entropy of each class by itself, in nats, summed over the classes.

    Of targets f32[b, classes] in [0, 1], any number of classes may be true.

    The sum is that of Beyer et al. 2020 (arXiv:2006.07159); with `mean` it is divided by the number of classes, as in
    "ResNet strikes back" (Wightman et al. 2021, arXiv:2110.00476). `label_smoothing` e in [0, 1) makes the targets
    1 - e + e / classes and e / classes. `positive_weights`, one number a class, multiply the part of the loss that
    rewards the class where it is true, as `pos_weight` does in PyTorch.
    """
    _check_smoothing("sigmoid", label_smoothing)
    targets = _smoothed(_targets(logits, labels), label_smoothing)
    entropies = optax.sigmoid_binary_cross_entropy(logits, targets)  # [b, classes]
    if positive_weights is not None:
        table = _table("positive_weights", positive_weights, logits)
        entropies += (table - 1) * targets * jax.nn.softplus(-logits)
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
    table = _table("class_weights", weights, logits)
    return losses * (table[labels] if labels.ndim == 1 else labels @ table)


def _table(name: str, weights: Sequence[float], logits: jax.Array) -> jax.Array:
    """f32[classes]: weights of the classes. Raises UserError for another number of them, or one below 0."""
    classes = logits.shape[-1]
    if isinstance(weights, str) or len(weights) != classes or min(weights) < 0:
        allowed = "'balanced' and " if name == "class_weights" else ""
        raise UserError(f"{name}={weights!r}: allowed are {allowed}{classes} numbers from 0, one a class")
    return jnp.asarray(weights, logits.dtype)


@with_tasks(Task.REGRESSION)
def mse(values: jax.Array, targets: jax.Array) -> jax.Array:
    """Squared error, the mean over the outputs. values, targets f32[b, outputs]."""
    return jnp.mean(optax.squared_error(values, targets), -1)


@with_tasks(Task.REGRESSION)
def mae(values: jax.Array, targets: jax.Array) -> jax.Array:
    """Absolute error, the mean over the outputs. values, targets f32[b, outputs]."""
    return jnp.mean(jnp.abs(values - targets), -1)


@with_tasks(Task.REGRESSION)
def huber(values: jax.Array, targets: jax.Array, delta: float = 1.0) -> jax.Array:
    """Huber's loss (Huber 1964), the mean over the outputs: squared error / 2 up to `delta`, linear beyond.

    values, targets f32[b, outputs]; `delta` is above 0, in the unit of the targets.
    """
    if delta <= 0:
        raise UserError(f"huber(delta={delta}): must be above 0")
    return jnp.mean(optax.huber_loss(values, targets, delta=delta), -1)


LOSSES = {"softmax": softmax, "sigmoid": sigmoid, "focal": focal, "mse": mse, "mae": mae, "huber": huber}


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
