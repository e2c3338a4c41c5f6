"""Metrics are sums and counts until the end, so that they add up over batches, devices and hosts.

Metrics of whole sets, such as AUC, are no sums. They are computed from all labels and probabilities of a set. So are
all metrics of several labels an example and of regressions but the loss and the likelihood, in float64 on the host.
"""

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.losses import SIGMOID, Link, Task
from imgclf_jax.scores import multilabel
from imgclf_jax.scores.classification import Given, Scores, label_ranks, predicted_classes
from imgclf_jax.scores.multilabel import MultilabelScores
from imgclf_jax.scores.regression import RegressionScores

Sums = dict[str, Any]
OWN = "own/"  # before the name of a value that the method's `evaluate` gives
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


class TargetPredictions(NamedTuple):
    """What a model says of each example whose target is several labels or numbers.

    Of several seeds `outputs` and `ranking` are [seeds + 1, n, k], the ensemble's last.
    """

    targets: Any  # f32[n, k]
    outputs: Any  # f32[n, k]: probabilities, or the values of a regression
    ranking: Any  # f32[n, k]: what orders the examples as the outputs do, without their ties by rounding
    mask: Any = None  # bool[n], False for padding; None if there is no padding

    def of_seed(self, i: int) -> "TargetPredictions":
        """Those of one of several seeds; -1 is their ensemble."""
        return self._replace(outputs=self.outputs[i], ranking=self.ranking[i])

    @property
    def given(self) -> Any:
        """What metrics of several labels take beside targets and outputs."""
        return self.ranking


AnyPredictions = Predictions | TargetPredictions


def predict(
    logits: jax.Array, wanted: jax.Array, link: Link, mask: jax.Array, task: Task = Task.CLASSES
) -> AnyPredictions:
    """The predictions that logits f32[..., b, k] make of examples with labels i32[b] or targets f32[b, k], by the task.

    For SOFT they are those of the dominant labels.
    """
    outputs = link.probabilities(logits.astype(jnp.float32))
    if task in (Task.MULTILABEL, Task.REGRESSION):
        return TargetPredictions(wanted, outputs, logits if link is SIGMOID else outputs, mask)
    labels = dominant_labels(wanted) if task is Task.SOFT else wanted
    return Predictions(labels, outputs, predicted_classes(logits), label_ranks(logits, labels), mask)


def concatenate[P: AnyPredictions](batches: Sequence[P]) -> P:
    """The predictions of all batches without the padding, on the host."""
    kind = type(batches[0])
    # The axis of the examples is the last, but for what has a number for each output.
    axes = {name: -2 if name in ("targets", "probabilities", "outputs", "ranking") else -1 for name in kind._fields}
    parts = {
        name: [_unpadded(getattr(batch, name), batch.mask, axis) for batch in batches]
        for name, axis in axes.items() if name != "mask"
    }  # fmt: skip
    whole: Any = kind(**{name: np.concatenate(part, axes[name]) for name, part in parts.items()})
    return whole


def _unpadded(values: Any, mask: Any, axis: int) -> Any:
    return values[..., mask, :] if axis == -2 else values[..., mask]


def dominant_labels(targets: jax.Array) -> jax.Array:
    """i32[b]: the class of the greatest share in each row of f32[b, classes], the first of equal ones."""
    return jnp.argmax(targets, -1).astype(jnp.int32)


def correct(logits: jax.Array, wanted: jax.Array, link: Link, task: Task) -> jax.Array | None:
    """bool[b]: which examples are predicted right; None for a regression, which has no right and wrong.

    logits f32[b, k]; wanted i32[b] for CLASSES, else f32[b, k]. For SOFT the dominant label counts. For MULTILABEL all
    classes have to be right, each predicted from a probability of 0.5 on and true from a target of 0.5 on.
    """
    if task is Task.REGRESSION:
        return None
    if task is Task.MULTILABEL:
        outputs = link.probabilities(logits)
        return jnp.all(((outputs >= 0.5) == (wanted >= 0.5)) & jnp.isfinite(outputs), -1)
    return is_correct(logits, dominant_labels(wanted) if task is Task.SOFT else wanted)


def task_sums(
    logits: jax.Array, wanted: jax.Array, loss: jax.Array, link: Link, mask: jax.Array, task: Task = Task.CLASSES
) -> Sums:
    """The sums of one batch by the task: see `classification_sums`, or `examples`, `loss`, `nll` and `nonfinite`.

    logits f32[b, k]; wanted i32[b] for CLASSES, else f32[b, k]; loss f32[b]. For SOFT the labels that are counted are
    the dominant ones, `nll` is the cross-entropy with the target, and `kl` its divergence from the prediction.
    `nonfinite` counts the examples whose outputs are NaN or infinite.
    """
    values = {"loss": loss} | ({"nll": link.nll(logits, wanted)} if link.nll else {})
    if task is Task.CLASSES:
        return classification_sums(logits, wanted, values, mask)
    if task is Task.SOFT:
        if "nll" in values:
            values["kl"] = values["nll"] + jnp.sum(jax.scipy.special.xlogy(wanted, wanted), -1)
        return classification_sums(logits, dominant_labels(wanted), values, mask)
    finite = jnp.all(jnp.isfinite(link.probabilities(logits)), -1)  # of infinite logits probabilities are 0 and 1
    return {
        "examples": jnp.sum(mask, dtype=jnp.int32),
        "nonfinite": jnp.sum(mask & ~finite, dtype=jnp.int32),
        **{name: jnp.sum(jnp.where(mask, value, 0.0)) for name, value in values.items()},
    }


def is_correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """bool[b]: whether the labels i32[b] are the predicted classes of the logits f32[b, classes]."""
    return predicted_classes(logits) == labels


def classification_sums(logits: jax.Array, labels: jax.Array, values: Mapping[str, jax.Array], mask: jax.Array) -> Sums:
    """Sums over the examples whose mask is True; the mask of padding is False.

    logits f32[b, classes], labels i32[b], mask bool[b]; `values` f32[b] by name are those of which the mean is
    reported, such as `loss` and `nll`. The sums are these, `examples`, `correct` and

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


OfPredictions = Callable[[Any], Any]  # of Predictions or TargetPredictions: a float, or several in a dict by name


def mean_over_seeds(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over several seeds, and its sample standard deviation `NAME_std`; `examples` as it is."""
    means = {"examples": each[0]["examples"]}
    for name in (name for name in each[0] if name != "examples"):
        values = [one[name] for one in each]
        with np.errstate(invalid="ignore"):  # a seed's loss may be infinite
            means |= {name: float(np.mean(values)), f"{name}_std": float(np.std(values, ddof=1))}
    return means


def summarize(
    sums: Mapping[str, Any],
    predictions: AnyPredictions | None = None,
    whole_set: Mapping[str, OfPredictions] | None = None,
) -> dict[str, float]:
    """What is reported: `examples`, and as means over them `accuracy`, `loss`, `nll`, `kl` and `top5`, if counted.

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
        names = [name for name in together if name != "examples" and OWN + name not in sums]
        return mean_over_seeds(each) | {f"ensemble_{name}": together[name] for name in names}
    n = int(sums["examples"])
    out: dict[str, float] = {"examples": n}
    if "correct" in sums:
        out["accuracy"] = int(sums["correct"]) / n
    out |= {name: float(sums[name]) / n for name in ("loss", "nll", "kl") if name in sums}
    if "top5" in sums:
        out["top5"] = int(sums["top5"]) / n
    out |= {name.removeprefix(OWN): float(value) / n for name, value in sums.items() if name.startswith(OWN)}
    for name, metric in (whole_set or {}).items() if predictions else ():
        value = metric(predictions)
        out |= value if isinstance(value, dict) else {name: value}
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
# What the key `metrics` may name, by the task.
BY_TASK = {Task.CLASSES: METRICS, Task.SOFT: METRICS, Task.MULTILABEL: multilabel.METRICS, Task.REGRESSION: {}}
# What results hold of each task beside the loss and, if there is a likelihood, `nll`.
OF_TASK = {
    Task.CLASSES: ("accuracy", "top5"),
    Task.SOFT: ("accuracy", "kl", "top5"),
    Task.MULTILABEL: ("mean_average_precision", "micro_f1", "macro_f1", "exact_match"),
    Task.REGRESSION: ("r2", "mae", "rmse"),
}

_OF_ALL = {task: ("loss",) if task is Task.REGRESSION else ("loss", "nll") for task in Task}

# Every metric that results hold, and which of its values is best. For a user's own metric `checkpoint.best` says it:
# "min:…" or "max:…".
BEST: dict[str, Literal["min", "max"]] = {
    "accuracy": "max", "loss": "min", "nll": "min", "top5": "max",
    "auc": "max", "balanced_accuracy": "max", "f1": "max",
}  # fmt: skip
# The same for those that only data with targets have.
BEST_OF_TARGETS: dict[str, Literal["min", "max"]] = {
    "kl": "min", "mean_average_precision": "max", "micro_f1": "max", "macro_f1": "max", "exact_match": "max",
    "r2": "max", "mae": "min", "rmse": "min",
}  # fmt: skip


def main_metric(task: Task) -> str:
    """The metric that runs of a task are ranked by."""
    return OF_TASK[task][0]


def build_whole_set(text: str, task: Task = Task.CLASSES, outputs: Sequence[str] = ()) -> dict[str, OfPredictions]:
    """The metrics of whole sets that a spec such as `auc|f1` names, by name; by "" those that every run reports.

    A user's own, named by import path, is a function of labels i32[n] and probabilities f32[n, classes]; of targets
    f32[n, k] and probabilities or values f32[n, k] for several labels and regressions. `outputs` are the names of the
    outputs of a regression.

    Raises UserError for an unknown name, for one that is there twice, and for one that results use for something else.
    """
    with_targets = task in (Task.MULTILABEL, Task.REGRESSION)
    found: dict[str, OfPredictions] = {"": functools.partial(_of_task, task, outputs)} if with_targets else {}
    not_own = re.compile("|".join(["examples", "loss", "nll", *OF_TASK[task], "ensemble_.*", ".*_std"]))
    given = ("targets", "probabilities", "ranking") if with_targets else ("labels", "probabilities", "given")
    for call in spec.parse(text):
        name = call.name.rpartition(":")[2]
        if name in found:
            raise UserError(f"metrics={text!r} names {name} twice; name each metric once")
        if ":" in call.name and not_own.fullmatch(name):
            raise UserError(f"metrics={text!r}: results use the name {name} for something else; rename your function")
        if ":" in call.name:
            found[name] = _of_probabilities(spec.bind(call, BY_TASK[task], "metric", given=given[:2]))
        else:
            found[name] = _of_given(spec.bind(call, BY_TASK[task], f"metric of {TASK_NAMES[task]}", given=given))
    return found


# What a run with a task has, in messages.
TASK_NAMES = {Task.CLASSES: "classes", Task.SOFT: "classes", Task.MULTILABEL: "several labels",
               Task.REGRESSION: "a regression"}  # fmt: skip


def target_scores(
    task: Task, predictions: TargetPredictions, outputs: Sequence[str] = ()
) -> MultilabelScores | RegressionScores:
    """The scores of predictions of several labels or of numbers."""
    if task is Task.MULTILABEL:
        return MultilabelScores(predictions.targets, predictions.outputs, predictions.ranking)
    return RegressionScores(predictions.targets, predictions.outputs, outputs)


def check_names(text: str, tasks: Sequence[Task]) -> None:
    """Raises UserError for a spec of metrics that none of the tasks of a loss has."""
    errors = []
    for task in tasks:
        try:
            build_whole_set(text, task)
        except UserError as e:
            errors.append(e)
    if len(errors) == len(tasks):
        raise errors[0]


def _of_task(task: Task, outputs: Sequence[str], predictions: TargetPredictions) -> dict[str, float]:
    """The metrics that every run of the task reports."""
    scores = target_scores(task, predictions, outputs)
    return {name: float(value[0]) for name, value in scores.of(np.ones((1, len(predictions.targets)))).items()}


def _of_probabilities(metric: Callable[..., float]) -> OfPredictions:
    return lambda predictions: metric(predictions[0], predictions[1])


def _of_given(metric: Callable[..., float]) -> OfPredictions:
    return lambda predictions: metric(predictions[0], predictions[1], predictions.given)


def parse_best(
    text: str, classes: int = 6, task: Task | None = None, own: Collection[str] = (), predicts: bool = True
) -> tuple[str, float]:
    """The metric that `checkpoint.best` names, and a sign: 1.0 if its greatest value is best, -1.0 if its smallest is.

    "min:test/my_error" gives ("test/my_error", -1.0). Raises UserError for a metric of unknown direction, and for one
    that so few classes have not. With a `task`, for one that it has not either; `own` are those of whole sets and of
    the method. A run that does not predict has the method's alone.
    """
    match = re.fullmatch(r"(?:(min|max):)?(.*)", text, re.DOTALL)
    assert match
    name = match[2]
    kind = name.partition("/")[2]
    of_task = (*_OF_ALL[task], *OF_TASK[task]) if task and predicts else ()
    if task and kind.partition("[")[0] not in (known := (*of_task, *filter(None, own))):
        what = TASK_NAMES[task] if predicts else "a method that trains no head"
        there = f"it has {', '.join(dict.fromkeys(known))}" if known else "it has no metric, so leave this empty"
        raise UserError(f"checkpoint.best={text!r}: a run with {what} has no {kind}; {there}")
    if name.endswith("/top5") and classes <= 5:
        raise UserError(f"checkpoint.best={text!r}: top5 is counted from six classes on, and the data have {classes}; "
                        "name another metric")  # fmt: skip
    directions = BEST if task is Task.CLASSES else BEST | BEST_OF_TARGETS
    direction = match[1] or directions.get(kind.partition("[")[0])
    if direction is None:
        raise UserError(f"checkpoint.best={text!r}: write 'min:{name}' if the smallest value of your metric is best, "
                        f"or 'max:{name}' if the greatest is")  # fmt: skip
    return name, 1.0 if direction == "max" else -1.0
