"""Metrics are sums and counts until the end, so that they add up over batches, devices and hosts.

Metrics of whole sets, such as AUC, are no sums. They are computed from all labels and probabilities of a set.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError

Sums = dict[str, Any]
Metric = Callable[[np.ndarray, np.ndarray], float]  # of labels i32[n] and probabilities f32[n, classes]

NO_STEP = 2**31 - 1  # `nonfinite_step` when every step was finite
CONFUSION_CLASSES = 1000  # with more classes no confusion matrix is counted: of 21,841 it would take 1.9 GB a batch


class Predictions(NamedTuple):
    """What a model says of each example, for metrics of whole sets."""

    labels: Any  # i32[n]
    probabilities: Any  # f32[n, classes]; of several seeds [seeds + 1, n, classes], the ensemble's last
    mask: Any = None  # bool[n], False for padding; None if there is no padding


def concatenate(batches: Sequence[Predictions]) -> Predictions:
    """The predictions of all batches without the padding, on the host."""
    return Predictions(
        np.concatenate([batch.labels[batch.mask] for batch in batches]),
        np.concatenate([batch.probabilities[..., batch.mask, :] for batch in batches], -2),
    )


def is_correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """bool[b]: whether the label has the greatest of the logits f32[b, classes]; the first class wins a tie.

    Logits whose greatest is NaN or infinite give no probabilities. They predict no class, so they are never correct.
    """
    return (jnp.argmax(logits, -1) == labels) & _predicts(logits)


def _predicts(logits: jax.Array) -> jax.Array:
    return jnp.isfinite(jnp.max(logits, -1))  # the maximum is NaN if one of them is


def classification_sums(logits: jax.Array, labels: jax.Array, values: Mapping[str, jax.Array], mask: jax.Array) -> Sums:
    """Sums over the examples whose mask is True; the mask of padding is False.

    logits f32[b, classes], labels i32[b], mask bool[b]; `values` f32[b] by name are those of which the mean is
    reported, `loss` and `nll`. The sums are these, `examples`, `correct` and

    - `class_examples`, `class_predicted`, `class_correct` i32[classes]: how many examples have the label, how many are
      predicted to have it, and of how many both is true;
    - `confusion` i32[classes, classes], for up to CONFUSION_CLASSES classes: how many examples have the label of the
      row and are predicted to have that of the column;
    - `top5`, from six classes on: how many examples have their label among the five greatest logits. Of equal logits
      the first ranks first.

    An example whose logits predict no class (see `is_correct`) is wrong, and is in no column of `confusion`.
    """
    classes = logits.shape[-1]
    prediction, correct = jnp.argmax(logits, -1), is_correct(logits, labels)
    predicted = _predicts(logits) & mask

    def count(labels: jax.Array, which: jax.Array) -> jax.Array:  # i32[classes]
        return jnp.sum((labels[:, None] == jnp.arange(classes)) & which[:, None], 0, dtype=jnp.int32)

    sums = {
        "examples": jnp.sum(mask, dtype=jnp.int32),
        "correct": jnp.sum(correct & mask, dtype=jnp.int32),
        **{name: jnp.sum(jnp.where(mask, value, 0.0)) for name, value in values.items()},
        "class_examples": count(labels, mask),
        "class_predicted": count(prediction, predicted),
        "class_correct": count(labels, correct & mask),
    }
    if classes <= CONFUSION_CLASSES:
        confusion = jnp.zeros((classes, classes), jnp.int32)
        sums["confusion"] = confusion.at[labels, prediction].add(predicted.astype(jnp.int32))
    if classes > 5:
        own = jnp.take_along_axis(logits, labels[:, None], -1)  # [b, 1]
        tied_before = (logits == own) & (jnp.arange(classes) < labels[:, None])
        above = jnp.sum((logits > own) | tied_before, -1)  # how many classes rank before the label
        sums["top5"] = jnp.sum((above < 5) & predicted, dtype=jnp.int32)
    return sums


def summarize(
    sums: Mapping[str, Any], predictions: Predictions | None = None, whole_set: Mapping[str, Metric] | None = None
) -> dict[str, float]:
    """What is reported: `examples`, and as means over them `accuracy`, `loss`, `nll` and, if counted, `top5`.

    Beside them the metrics `whole_set`, by name, of the `predictions`. Sums of several seeds are [seeds + 1, …], the
    ensemble's last. Then each metric is the mean over the seeds. Its sample standard deviation is called `NAME_std`,
    and the ensemble's value `ensemble_NAME`.
    """
    if np.ndim(sums["examples"]):
        *each, together = [
            summarize({name: value[i] for name, value in sums.items()}, _of_seed(predictions, i), whole_set)
            for i in range(len(sums["examples"]))
        ]
        names = [name for name in together if name != "examples"]
        out = {"examples": together["examples"]}
        for name in names:
            values = [one[name] for one in each]
            with np.errstate(invalid="ignore"):  # a seed's loss may be infinite
                out |= {name: float(np.mean(values)), f"{name}_std": float(np.std(values, ddof=1))}
        return out | {f"ensemble_{name}": together[name] for name in names}
    n = int(sums["examples"])
    out = {"examples": n, "accuracy": int(sums["correct"]) / n}
    out |= {name: float(sums[name]) / n for name in ("loss", "nll") if name in sums}
    if "top5" in sums:
        out["top5"] = int(sums["top5"]) / n
    if predictions:
        out |= {name: of(predictions.labels, predictions.probabilities) for name, of in (whole_set or {}).items()}
    return out


def _of_seed(predictions: Predictions | None, i: int) -> Predictions | None:
    return predictions and predictions._replace(probabilities=predictions.probabilities[i])


def auc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Area under the ROC curve; of more than two classes the mean over the classes of each against all others.

    labels i32[n], probabilities f32[n, classes]. NaN if a class has no example, and if a probability is NaN.
    """
    from sklearn.metrics import roc_auc_score

    classes = probabilities.shape[1]
    if len(np.unique(labels)) < classes or np.isnan(probabilities).any():
        return float("nan")
    first = 1 if classes == 2 else 0
    return float(np.mean([roc_auc_score(labels == c, probabilities[:, c]) for c in range(first, classes)]))


def balanced_accuracy(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The mean over the classes of the share of each class's examples that are recognized.

    labels i32[n], probabilities f32[n, classes]. Classes without examples are left out; NaN predicts no class.
    """
    from sklearn.metrics import balanced_accuracy_score

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")
        return float(balanced_accuracy_score(labels, _predicted_classes(probabilities)))


def f1(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """F1, the harmonic mean of precision and recall: of two classes the second's, of more the mean over the classes.

    labels i32[n], probabilities f32[n, classes]. A class that is neither a label nor predicted is left out; NaN
    predicts no class.
    """
    from sklearn.metrics import f1_score

    found, classes = _predicted_classes(probabilities), probabilities.shape[1]
    if classes == 2:
        return float(f1_score(labels == 1, found == 1, zero_division=0))
    known = np.union1d(labels, found[found < classes])
    return float(f1_score(labels, found, labels=known, average="macro", zero_division=0))


def _predicted_classes(probabilities: np.ndarray) -> np.ndarray:
    """int[n]: the class of the greatest probability; of a row with NaN a number that no class has."""
    broken = np.isnan(probabilities).any(1)
    return np.where(broken, probabilities.shape[1], probabilities.argmax(1))


METRICS: dict[str, Metric] = {"auc": auc, "balanced_accuracy": balanced_accuracy, "f1": f1}

# Every metric that results hold, and which of its values is best. For a user's own metric `checkpoint.best` says it:
# "min:…" or "max:…".
BEST: dict[str, Literal["min", "max"]] = {
    "accuracy": "max", "loss": "min", "nll": "min", "top5": "max",
    "auc": "max", "balanced_accuracy": "max", "f1": "max",
}  # fmt: skip

_NOT_OWN = re.compile(r"examples|accuracy|loss|nll|top5|ensemble_.*|.*_std")  # what results hold besides these metrics


def build_whole_set(text: str) -> dict[str, Metric]:
    """The metrics that a spec such as `auc|f1` names, by name; the user's own are named by import path.

    Raises UserError for an unknown name, for one that is there twice, and for one that results use for something else.
    """
    found: dict[str, Metric] = {}
    for call in spec.parse(text):
        name = call.name.rpartition(":")[2]
        if name in found:
            raise UserError(f"metrics={text!r} names {name} twice; name each metric once")
        if ":" in call.name and _NOT_OWN.fullmatch(name):
            raise UserError(f"metrics={text!r}: results use the name {name} for something else; rename your function")
        found[name] = spec.bind(call, METRICS, "metric", given=("labels", "probabilities"))
    return found


def parse_best(text: str, classes: int = 6) -> tuple[str, float]:
    """The metric that `checkpoint.best` names, and a sign: 1.0 if its greatest value is best, -1.0 if its smallest is.

    "min:test/my_error" gives ("test/my_error", -1.0). Raises UserError for a metric of unknown direction, and for one
    that so few classes have not.
    """
    match = re.fullmatch(r"(?:(min|max):)?(.*)", text, re.DOTALL)
    assert match
    name = match[2]
    if name.endswith("/top5") and classes <= 5:
        raise UserError(f"checkpoint.best={text!r}: top5 is counted from six classes on, and the data have {classes}; "
                        "name another metric")  # fmt: skip
    direction = match[1] or BEST.get(name.rpartition("/")[2])
    if direction is None:
        raise UserError(f"checkpoint.best={text!r}: write 'min:{name}' if the smallest value of your metric is best, "
                        f"or 'max:{name}' if the greatest is")  # fmt: skip
    return name, 1.0 if direction == "max" else -1.0
