"""Metrics are sums and counts until the end, so that they add up over batches, devices and hosts.

Metrics of whole sets, such as AUC, are no sums. They are computed from all labels and probabilities of a set.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.analysis.scores import Given, Scores, label_ranks, predicted_classes
from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.losses import Link

Sums = dict[str, Any]
NO_STEP = 2**31 - 1  # `nonfinite_step` when every step was finite
CONFUSION_CLASSES = 1000  # with more classes no confusion matrix is counted: of 21,841 it would take 1.9 GB a batch


class Predictions(NamedTuple):
    """What a model says of each example, for metrics of whole sets.

    Of several seeds all but the labels and the mask are [seeds + 1, n, …], the ensemble's last.
    """

    labels: Any  # i32[n]
    probabilities: Any  # f32[n, classes]
    predicted: Any  # i32[n], of the logits: float32 rounds probabilities of large logits to equal ones
    ranks: Any  # i32[n], of the label among the logits; see `scores.label_ranks`
    mask: Any = None  # bool[n], False for padding; None if there is no padding

    def of_seed(self, i: int) -> "Predictions":
        """Those of one of several seeds; -1 is their ensemble."""
        return self._replace(probabilities=self.probabilities[i], predicted=self.predicted[i], ranks=self.ranks[i])

    @property
    def given(self) -> tuple[Any, Any]:
        """What `scores.Scores` takes as given."""
        return self.predicted, self.ranks


def predict(logits: jax.Array, labels: jax.Array, link: Link, mask: jax.Array) -> Predictions:
    """The predictions that logits f32[..., b, classes] make of examples with the labels i32[b]."""
    probabilities = link.probabilities(logits.astype(jnp.float32))
    return Predictions(labels, probabilities, predicted_classes(logits), label_ranks(logits, labels), mask)


def concatenate(batches: Sequence[Predictions]) -> Predictions:
    """The predictions of all batches without the padding, on the host."""
    whole = [
        (batch.labels[batch.mask], batch.probabilities[..., batch.mask, :], batch.predicted[..., batch.mask],
         batch.ranks[..., batch.mask])
        for batch in batches
    ]  # fmt: skip
    axes = (-1, -2, -1, -1)
    return Predictions(
        *(np.concatenate(parts, axis) for parts, axis in zip(zip(*whole, strict=True), axes, strict=True))
    )


def is_correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """bool[b]: whether the labels i32[b] are the predicted classes of the logits f32[b, classes]."""
    return predicted_classes(logits) == labels


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

    An example whose logits predict no class (see `predicted_classes`) is wrong, and is in no column of `confusion`.
    """
    classes, predicted = logits.shape[-1], predicted_classes(logits)
    correct = predicted == labels

    def count(numbers: jax.Array, which: jax.Array) -> jax.Array:  # i32[classes]
        return jnp.sum((numbers[:, None] == jnp.arange(classes)) & which[:, None], 0, dtype=jnp.int32)

    sums = {
        "examples": jnp.sum(mask, dtype=jnp.int32),
        "correct": jnp.sum(correct & mask, dtype=jnp.int32),
        **{name: jnp.sum(jnp.where(mask, value, 0.0)) for name, value in values.items()},
        "class_examples": count(labels, mask),
        "class_predicted": count(predicted, mask),
        "class_correct": count(labels, correct & mask),
    }
    if classes <= CONFUSION_CLASSES:
        confusion = jnp.zeros((classes, classes), jnp.int32)
        counted = (mask & (predicted >= 0)).astype(jnp.int32)
        sums["confusion"] = confusion.at[labels, predicted].add(counted)
    if classes > 5:
        sums["top5"] = jnp.sum((label_ranks(logits, labels) < 5) & mask, dtype=jnp.int32)
    return sums


OfPredictions = Callable[[Predictions], float]


def summarize(
    sums: Mapping[str, Any],
    predictions: Predictions | None = None,
    whole_set: Mapping[str, OfPredictions] | None = None,
) -> dict[str, float]:
    """What is reported: `examples`, and as means over them `accuracy`, `loss`, `nll` and, if counted, `top5`.

    Beside them the metrics `whole_set`, by name, of the `predictions`. Sums of several seeds are [seeds + 1, …], the
    ensemble's last. Then each metric is the mean over the seeds. Its sample standard deviation is called `NAME_std`,
    and the ensemble's value `ensemble_NAME`.
    """
    if np.ndim(sums["examples"]):
        *each, together = [
            summarize(
                {name: value[i] for name, value in sums.items()}, predictions and predictions.of_seed(i), whole_set
            )
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
        out |= {name: metric(predictions) for name, metric in (whole_set or {}).items()}
    return out


def auc(labels: np.ndarray, probabilities: np.ndarray, given: Given = None) -> float:
    """Area under the ROC curve; of more than two classes the mean over the classes of each against all others.

    labels i32[n], probabilities f32[n, classes]. Classes that no example has, or every example, are left out of the
    mean, see `Scores.auc`. NaN if a probability is NaN.
    """
    return float(Scores(labels, probabilities, given).auc(np.ones((1, len(labels))))[0])


def balanced_accuracy(labels: np.ndarray, probabilities: np.ndarray, given: Given = None) -> float:
    """The mean over the classes of the share of each class's examples that are recognized.

    labels i32[n], probabilities f32[n, classes]. Classes without examples are left out.
    """
    counts = Scores(labels, probabilities, given).by_class(np.ones((1, len(labels))))
    return float(counts.mean(counts.right, counts.labelled, counts.labelled > 0)[0])


def f1(labels: np.ndarray, probabilities: np.ndarray, given: Given = None) -> float:
    """F1, the harmonic mean of precision and recall: of two classes the second's, of more the mean over the classes.

    labels i32[n], probabilities f32[n, classes]. A class that is neither a label nor predicted is left out of the mean.
    """
    counts = Scores(labels, probabilities, given).by_class(np.ones((1, len(labels))))
    among = counts.found if probabilities.shape[1] > 2 else np.array([[False, True]])
    return float(counts.mean(2 * counts.right, counts.labelled + counts.predicted, among)[0])


METRICS: dict[str, Callable[..., float]] = {"auc": auc, "balanced_accuracy": balanced_accuracy, "f1": f1}

# Every metric that results hold, and which of its values is best. For a user's own metric `checkpoint.best` says it:
# "min:…" or "max:…".
BEST: dict[str, Literal["min", "max"]] = {
    "accuracy": "max", "loss": "min", "nll": "min", "top5": "max",
    "auc": "max", "balanced_accuracy": "max", "f1": "max",
}  # fmt: skip

_NOT_OWN = re.compile(r"examples|accuracy|loss|nll|top5|ensemble_.*|.*_std")  # what results hold besides these metrics


def build_whole_set(text: str) -> dict[str, OfPredictions]:
    """The metrics that a spec such as `auc|f1` names, by name; the user's own are named by import path.

    A user's own is a function of labels i32[n] and probabilities f32[n, classes].

    Raises UserError for an unknown name, for one that is there twice, and for one that results use for something else.
    """
    found: dict[str, OfPredictions] = {}
    for call in spec.parse(text):
        name = call.name.rpartition(":")[2]
        if name in found:
            raise UserError(f"metrics={text!r} names {name} twice; name each metric once")
        if ":" in call.name and _NOT_OWN.fullmatch(name):
            raise UserError(f"metrics={text!r}: results use the name {name} for something else; rename your function")
        if ":" in call.name:
            found[name] = _of_probabilities(spec.bind(call, METRICS, "metric", given=("labels", "probabilities")))
        else:
            found[name] = _of_given(spec.bind(call, METRICS, "metric", given=("labels", "probabilities", "given")))
    return found


def _of_probabilities(metric: Callable[..., float]) -> OfPredictions:
    return lambda predictions: metric(predictions.labels, predictions.probabilities)


def _of_given(metric: Callable[..., float]) -> OfPredictions:
    return lambda predictions: metric(predictions.labels, predictions.probabilities, predictions.given)


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
