"""Metrics of evaluation: sums and counts that add up over batches, devices and hosts, and whole-set metrics.

Whole-set metrics, such as AUC, need all labels and probabilities of an evaluation set and are computed on the host in
float64. In multi-label classification, so is everything but the loss and the likelihood.
"""

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.config import TARGET_METRICS
from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Array, Function
from imgclf_jax.losses import Link, Task
from imgclf_jax.scores import multilabel
from imgclf_jax.scores.classification import FromLogits, Scores, label_ranks, predicted_classes
from imgclf_jax.scores.multilabel import MultilabelScores

type Sums = dict[str, Any]
OWN = "own/"  # prefix of the metrics that a method's `evaluate` returns
NO_STEP = 2**31 - 1  # `nonfinite_step` when every step was finite
CONFUSION_CLASSES = 1000  # the most classes with a confusion matrix; of 21,841 it would take 1.9 GB per batch


class Predictions(NamedTuple):
    """A model's predictions of n examples with labels, for whole-set metrics.

    With several seeds all but the labels and the mask are [seeds + 1, n, …], the ensemble last.
    """

    labels: Array  # i32[n]
    probabilities: Array  # f32[n, classes]
    predicted: Array  # i32[n], from the logits: float32 rounds probabilities of distinct large logits to equal ones
    ranks: Array  # i32[n], of the label among the logits: see `scores.label_ranks`
    mask: Array | None = None  # bool[n], False for padding; None without padding
    log_odds: Array | None = None  # f32[n, classes], see `losses.Link`; None for a link without

    def losses(self) -> np.ndarray:
        """The negative log-likelihood f64[n] of each label, on the host; nan without a label or a prediction."""
        of_labels = self.probabilities if self.log_odds is None else self.log_odds
        own = np.take_along_axis(np.asarray(of_labels, np.float64), np.asarray(self.labels)[:, None], 1)[:, 0]
        if self.log_odds is None:
            with np.errstate(divide="ignore"):
                losses = np.maximum(-np.log(own), 0.0)
        else:
            losses = np.logaddexp(0.0, -own)  # float32 rounds small probabilities to 0
        return np.where((self.labels >= 0) & (self.predicted >= 0), losses, np.nan)

    def highest_losses(self, most: int) -> np.ndarray:
        """The indices int[m] of the `most` examples with the highest loss; ties are in set order."""
        losses = self.losses()
        order = np.argsort(-losses, kind="stable")[:most]
        return order[~np.isnan(losses[order])]

    def for_seed(self, i: int) -> "Predictions":
        """The predictions of one of several seeds, or of their ensemble, -1."""
        log_odds = None if self.log_odds is None else self.log_odds[i]
        return self._replace(
            probabilities=self.probabilities[i], predicted=self.predicted[i], ranks=self.ranks[i], log_odds=log_odds
        )

    @property
    def from_logits(self) -> FromLogits:
        """What `scores.Scores` takes from the logits."""
        return FromLogits(self.predicted, self.ranks, self.log_odds)


class TargetPredictions(NamedTuple):
    """A model's predictions of n examples with multi-label targets.

    With several seeds `outputs` and `ranking` are [seeds + 1, n, k], the ensemble last.
    """

    targets: Array  # f32[n, k]
    outputs: Array  # f32[n, k]: probabilities
    ranking: Array  # f32[n, k]: orders the examples as the outputs do, but without ties by rounding
    mask: Array | None = None  # bool[n], False for padding; None without padding

    def for_seed(self, i: int) -> "TargetPredictions":
        """The predictions of one of several seeds, or of their ensemble, -1."""
        return self._replace(outputs=self.outputs[i], ranking=self.ranking[i])


AnyPredictions = Predictions | TargetPredictions


def predict(
    logits: jax.Array, wanted: jax.Array, link: Link, mask: jax.Array, task: Task = Task.CLASSES
) -> AnyPredictions:
    """Returns the predictions that logits f32[..., b, k] make of labels i32[b] or targets f32[b, k], by the task.

    SOFT targets are replaced by their dominant labels.
    """
    outputs = link.probabilities(logits.astype(jnp.float32))
    log_odds = link.log_odds(logits.astype(jnp.float32)) if link.log_odds else None
    if task is Task.MULTILABEL:
        return TargetPredictions(wanted, outputs, outputs if log_odds is None else log_odds, mask)
    labels = dominant_labels(wanted) if task is Task.SOFT else wanted
    return Predictions(labels, outputs, predicted_classes(logits), label_ranks(logits, labels), mask, log_odds)


def concatenate[P: AnyPredictions](batches: Sequence[P]) -> P:
    """Concatenates the predictions of all batches on the host, without the padding."""
    kind = type(batches[0])
    # Examples are the last axis, except in fields with a number per output.
    of_outputs = ("targets", "probabilities", "outputs", "ranking", "log_odds")
    axes = {name: -2 if name in of_outputs else -1 for name in kind._fields}
    fields = {
        name: np.concatenate([_unpad(getattr(batch, name), batch.mask, axis) for batch in batches], axis)
        for name, axis in axes.items() if name != "mask" and getattr(batches[0], name) is not None
    }  # fmt: skip
    out: Any = kind(**fields)
    return out


def _unpad(values: Array, mask: Array | None, axis: int) -> np.ndarray:
    return values[..., mask, :] if axis == -2 else values[..., mask]


def dominant_labels(targets: jax.Array) -> jax.Array:
    """i32[b]: the class with the greatest share in each row of f32[b, classes]; the first wins a tie."""
    return jnp.argmax(targets, -1).astype(jnp.int32)


def correct(logits: jax.Array, wanted: jax.Array, link: Link, task: Task) -> jax.Array:
    """bool[b]: which predictions are correct.

    logits f32[b, k]; wanted i32[b] for CLASSES, else f32[b, k]. SOFT compares with the dominant label. MULTILABEL needs
    every class correct, with thresholds of 0.5 on probabilities and targets.
    """
    if task is Task.MULTILABEL:
        outputs = link.probabilities(logits)
        return jnp.all(((outputs >= 0.5) == (wanted >= 0.5)) & jnp.isfinite(outputs), -1)
    return predicted_classes(logits) == (dominant_labels(wanted) if task is Task.SOFT else wanted)


def task_sums(
    logits: jax.Array, wanted: jax.Array, loss: jax.Array, link: Link, mask: jax.Array, task: Task = Task.CLASSES
) -> Sums:
    """Metric sums of one batch: those of `classification_sums`, or `examples`, `loss`, `nll` and `nonfinite`.

    logits f32[b, k]; wanted i32[b] for CLASSES, else f32[b, k]; loss f32[b]. SOFT counts the dominant labels; its `nll`
    is the cross-entropy with the target, and `kl` is KL(target || prediction). `nonfinite` counts examples with NaN or
    infinite outputs.
    """
    values = {"loss": loss} | ({"nll": link.nll(logits, wanted)} if link.nll else {})
    if task is Task.CLASSES:
        return classification_sums(logits, wanted, values, mask)
    if task is Task.SOFT:
        if "nll" in values:
            values["kl"] = values["nll"] + jnp.sum(jax.scipy.special.xlogy(wanted, wanted), -1)
        return classification_sums(logits, dominant_labels(wanted), values, mask)
    finite = jnp.all(jnp.isfinite(link.probabilities(logits)), -1)  # infinite logits may have finite probabilities
    return {
        "examples": jnp.sum(mask, dtype=jnp.int32),
        "nonfinite": jnp.sum(mask & ~finite, dtype=jnp.int32),
        **{name: jnp.sum(jnp.where(mask, value, 0.0)) for name, value in values.items()},
    }


def classification_sums(logits: jax.Array, labels: jax.Array, values: Mapping[str, jax.Array], mask: jax.Array) -> Sums:
    """Metric sums over the examples whose mask bool[b] is True; it is False for padding.

    logits f32[b, classes], labels i32[b]; `values` f32[b] by name are summed too, such as `loss` and `nll`. The other
    sums are `examples`, `correct` and

    - `class_examples`, `class_predicted`, `class_correct` i32[classes]: the number of labels, of predictions and of
      correct predictions of each class;
    - `confusion` i32[classes, classes], for up to CONFUSION_CLASSES classes: labels by row, predictions by column;
    - `top5`, with six or more classes: labels among the five greatest logits. The first of equal logits ranks first.

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


type WholeSetMetric = Callable[[Any], Any]  # Predictions or TargetPredictions → a float, or a dict of floats by name


def mean_over_seeds(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric but `examples` over several seeds, and its sample standard deviation `NAME_std`."""
    means = {"examples": each[0]["examples"]}
    for name in (name for name in each[0] if name != "examples"):
        values = [one[name] for one in each]
        with np.errstate(invalid="ignore"):  # a seed's loss may be infinite
            means |= {name: float(np.mean(values)), f"{name}_std": float(np.std(values, ddof=1))}
    return means


def summarize(
    sums: Mapping[str, Array], predictions: AnyPredictions | None = None,
    whole_set: Mapping[str, WholeSetMetric] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Reports `examples`, the means `accuracy`, `loss`, `nll`, `kl` and `top5` if summed, and whole-set metrics.

    `whole_set` metrics, by name, are computed from the `predictions`. Sums of several seeds are [seeds + 1, …], the
    ensemble last. Then each metric is the mean over seeds, `NAME_std` its sample standard deviation, and
    `ensemble_NAME` the ensemble's value.
    """
    if np.ndim(sums["examples"]):
        *each, ensemble = [
            summarize(
                {name: value[i] for name, value in sums.items()}, predictions and predictions.for_seed(i), whole_set
            )
            for i in range(len(sums["examples"]))
        ]
        names = [name for name in ensemble if name != "examples" and OWN + name not in sums]
        return mean_over_seeds(each) | {f"ensemble_{name}": ensemble[name] for name in names}
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


def auc(labels: np.ndarray, probabilities: np.ndarray, from_logits: FromLogits | None = None) -> float:
    """Area under the ROC curve: of the second of two classes, else the one-vs-rest mean over the classes.

    labels i32[n], probabilities f32[n, classes]. The mean skips classes that no example or every example has: see
    `Scores.auc`. NaN if a probability is NaN.
    """
    return float(Scores(labels, probabilities, from_logits).auc(np.ones((1, len(labels))))[0])


def balanced_accuracy(labels: np.ndarray, probabilities: np.ndarray, from_logits: FromLogits | None = None) -> float:
    """The mean recall over the classes that have examples. labels i32[n], probabilities f32[n, classes]."""
    counts = Scores(labels, probabilities, from_logits).class_counts(np.ones((1, len(labels))))
    return float(counts.mean(counts.correct, counts.labelled, counts.labelled > 0)[0])


def f1(labels: np.ndarray, probabilities: np.ndarray, from_logits: FromLogits | None = None) -> float:
    """F1: of the second of two classes, else the mean over the classes that are labels or predictions.

    labels i32[n], probabilities f32[n, classes].
    """
    counts = Scores(labels, probabilities, from_logits).class_counts(np.ones((1, len(labels))))
    among = counts.present if probabilities.shape[1] > 2 else np.array([[False, True]])
    return float(counts.mean(2 * counts.correct, counts.labelled + counts.predicted, among)[0])


METRICS: dict[str, Callable[..., float]] = {"auc": auc, "balanced_accuracy": balanced_accuracy, "f1": f1}
# The values of the config key `metrics`, by task.
BY_TASK = {Task.CLASSES: METRICS, Task.SOFT: METRICS, Task.MULTILABEL: multilabel.METRICS}
# The metrics that every run of a task reports, besides the loss and, for a loss with a likelihood, `nll`.
REPORTED = {
    Task.CLASSES: ("accuracy", "top5"),
    Task.SOFT: ("accuracy", "kl", "top5"),
    Task.MULTILABEL: ("mean_average_precision", "micro_f1", "macro_f1", "exact_match"),
}

# Whether the smallest or the greatest value of a metric is best; `checkpoint.best` says it for a user's own metric,
# and `config.TARGET_METRICS` for those of data with targets.
BEST: dict[str, Literal["min", "max"]] = {
    "accuracy": "max", "loss": "min", "nll": "min", "top5": "max",
    "auc": "max", "balanced_accuracy": "max", "f1": "max",
}  # fmt: skip


def build_whole_set(text: str, task: Task = Task.CLASSES, outputs: Sequence[str] = ()) -> dict[str, WholeSetMetric]:
    """Returns the whole-set metrics that a spec such as `auc|f1` names, by name; "" has those of every run of the task.

    A user's metric, named by import path, is a function of labels i32[n] and probabilities f32[n, classes]; for
    MULTILABEL, of targets and probabilities f32[n, k]. `outputs` names the classes, () before the data are known.

    Raises UserError for an unknown name, one that occurs twice, or one that results use for something else, and given
    `outputs` for arguments that a metric does not take.
    """
    with_targets = task is Task.MULTILABEL
    whole_set: dict[str, WholeSetMetric] = {"": _report} if with_targets else {}
    reserved = reserved_names(task)
    leading = ("targets", "probabilities", "ranking") if with_targets else ("labels", "probabilities", "from_logits")
    for call in spec.parse(text):
        name = call.name.rpartition(":")[2]
        if name in whole_set:
            raise UserError(f"metrics={text!r} names {name} twice; name each metric once")
        if ":" in call.name and reserved.fullmatch(name):
            raise UserError(f"metrics={text!r}: results use the name {name} for something else; rename your function")
        if ":" in call.name:
            own = _call_with(spec.bind(call, BY_TASK[task], "metric", leading=leading[:2]))
            whole_set[name] = functools.partial(_number, call.name, own)
        else:
            metric = spec.bind(call, BY_TASK[task], f"metric of {TASK_NAMES[task]}", leading=leading)
            if metric.func is multilabel.f1 and outputs:
                _check_f1(text, len(outputs), metric.keywords)
            whole_set[name] = _call_with(metric, leading[2])
    return whole_set


def _check_f1(text: str, classes: int, arguments: Mapping[str, Any]) -> None:
    """Raises UserError naming the key `metrics` for arguments that the F1 of several labels does not take."""
    try:
        multilabel.check_f1(classes, **arguments)
    except UserError as e:
        raise UserError(f"metrics={text!r}: {e}") from e


def own_names(sums: Mapping[str, Any]) -> list[str]:
    """The names of the metrics among the sums that a method's `evaluate` returns."""
    return [name.removeprefix(OWN) for name in sums if name.startswith(OWN)]


def reserved_names(task: Task, predicts: bool = True) -> re.Pattern[str]:
    """The names of metrics that results use themselves; those of a run that `predicts` nothing are fewer."""
    reported = ("loss", "nll", *REPORTED[task]) if predicts else ()
    return re.compile("|".join(("examples", *reported, "ensemble_.*", ".*_std", *_OF_EVALUATE)))


# Further keys of `evaluate --format json`.
_OF_EVALUATE = ("scores", "confusion", "classes", "class_(names|examples|predicted|correct)", "target_names")

# The task in messages: "a run with …".
TASK_NAMES = {Task.CLASSES: "classes", Task.SOFT: "classes", Task.MULTILABEL: "several labels"}


def multilabel_scores(predictions: TargetPredictions) -> MultilabelScores:
    """The scores of multi-label predictions."""
    return MultilabelScores(predictions.targets, predictions.outputs, predictions.ranking)


def check_names(text: str, tasks: Sequence[Task]) -> None:
    """Raises UserError for a spec of metrics that no task of a loss has."""
    errors = []
    for task in tasks:
        try:
            build_whole_set(text, task)
        except UserError as e:
            errors.append(e)
    if len(errors) == len(tasks):
        raise errors[0]


def _report(predictions: TargetPredictions) -> dict[str, float]:
    """The metrics that every multi-label run reports."""
    scores = multilabel_scores(predictions)
    return {name: float(value[0]) for name, value in scores.compute(np.ones((1, len(predictions.targets)))).items()}


def _number(name: str, metric: Function, predictions: Any) -> float:
    """The value of a user's metric. Raises UserError unless it is a real number."""
    value = metric(predictions)
    if np.ndim(value) or np.asarray(value).dtype.kind not in "fiu":
        raise UserError(f"the metric {name} returns {value!r:.80}; it must return one real number")
    return float(value)


def _call_with(metric: Callable[..., float], *fields: str) -> WholeSetMetric:
    """Calls a metric with labels or targets, probabilities, and these fields of the predictions."""
    return lambda predictions: metric(*predictions[:2], *(getattr(predictions, field) for field in fields))


def parse_best(
    text: str, outputs: Sequence[str] = (), task: Task | None = None, own: Collection[str] = (), predicts: bool = True,
    key: str = "checkpoint.best",
) -> tuple[str, float]:  # fmt: skip
    """Returns the metric that `text` of a config's `key` names, and 1.0 if its greatest value is best, else -1.0.

    For example ("test/my_error", -1.0) for "min:test/my_error". `own` are the whole-set metrics and those of the
    method; a run without `predicts` has no others. Raises UserError for a metric of unknown direction and, given a
    `task` and the names of its classes or `outputs`, for one that evaluation does not report.
    """
    match = re.fullmatch(r"(?:(min|max):)?(.*)", text, re.DOTALL)
    assert match
    name = match[2]
    kind = name.partition("/")[2]
    reported = ("loss", "nll", *REPORTED[task]) if task and predicts else ()
    known = dict.fromkeys((*reported, *filter(None, own)))
    if task and kind not in known:
        run = TASK_NAMES[task] if predicts else "a method that trains no head"
        fix = f"it has {', '.join(known)}" if known else "it has no metric, so leave this empty"
        raise UserError(f"{key}={text!r}: a run with {run} has no {kind}; {fix}")
    if task and kind == "top5" and len(outputs) <= 5:
        raise UserError(f"{key}={text!r}: top5 needs six classes or more, and the data have {len(outputs)}; name "
                        "another metric")  # fmt: skip
    directions = BEST if task is Task.CLASSES else BEST | TARGET_METRICS
    direction = match[1] or directions.get(kind)
    if direction is None:
        raise UserError(f"{key}={text!r}: write 'min:{name}' if the smallest value of your metric is best, "
                        f"or 'max:{name}' if the greatest is")  # fmt: skip
    return name, 1.0 if direction == "max" else -1.0
