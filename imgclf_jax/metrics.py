"""Metrics of evaluation: sums and counts that add up over batches, devices and hosts, and whole-set metrics.

Whole-set metrics, such as AUC, need all labels and probabilities of an evaluation set and are computed on the host in
float64. In multi-label classification, so is everything but the loss and the likelihood.
"""

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.config import TARGET_METRICS
from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Array, Function
from imgclf_jax.losses import Link, Task
from imgclf_jax.scores import classification, multilabel
from imgclf_jax.scores.classification import Predictions, label_ranks, predicted_classes
from imgclf_jax.scores.multilabel import TargetPredictions

type Sums = dict[str, Any]
OWN = "own/"  # prefix of the metrics that a method's `evaluate` returns
NO_STEP = 2**31 - 1  # `nonfinite_step` when every step was finite
CONFUSION_CLASSES = 1000  # the most classes with a confusion matrix; of 21,841 it would take 1.9 GB per batch

AnyPredictions = Predictions | TargetPredictions
_OF_OUTPUTS = ("targets", "probabilities", "ranking", "log_odds")  # fields [..., n, k]; the others [..., n]


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

    def join(name: str) -> np.ndarray | None:
        if name == "mask" or getattr(batches[0], name) is None:
            return None
        rest = (slice(None),) if name in _OF_OUTPUTS else ()
        return np.concatenate([getattr(batch, name)[..., batch.mask, *rest] for batch in batches], -1 - len(rest))

    kind: Any = type(batches[0])
    joined: P = kind(*map(join, kind._fields))
    return joined


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


# The values of the config key `metrics`, by task.
BY_TASK = {
    Task.CLASSES: classification.METRICS,
    Task.SOFT: classification.METRICS,
    Task.MULTILABEL: multilabel.METRICS,
}
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
    whole_set: dict[str, WholeSetMetric] = {"": _report} if task is Task.MULTILABEL else {}
    leading = ("targets" if task is Task.MULTILABEL else "labels", "probabilities")
    for call in spec.parse(text):
        name = call.name.rpartition(":")[2]
        if name in whole_set:
            raise UserError(f"metrics={text!r} names {name} twice; name each metric once")
        if ":" in call.name:
            if reserved_names(task).fullmatch(name):
                raise UserError(f"metrics={text!r}: results use the name {name} for something else; rename your "
                                "function")  # fmt: skip
            metric = spec.bind(call, {}, "metric", leading=leading)
            whole_set[name] = functools.partial(_compute_user_metric, call.name, metric)
            continue
        whole_set[name] = metric = spec.bind(
            call, BY_TASK[task], f"metric of {TASK_NAMES[task]}", leading=("predictions",)
        )
        if metric.func is multilabel.f1 and outputs:
            multilabel.check_f1(len(outputs), **metric.keywords)
    return whole_set


def _compute_user_metric(name: str, metric: Function, predictions: Any) -> float:
    """The value of a user's metric. Raises UserError unless it is a real number."""
    value = metric(*predictions[:2])
    if np.ndim(value) or np.asarray(value).dtype.kind not in "fiu":
        raise UserError(f"the metric {name} returns {value!r:.80}; it must return one real number")
    return float(value)


def _report(predictions: TargetPredictions) -> dict[str, float]:
    """The metrics that every multi-label run reports."""
    scores = predictions.compute(np.ones((1, len(predictions.targets))))
    return {name: float(value[0]) for name, value in scores.items()}


def check_names(text: str, tasks: Sequence[Task]) -> None:
    """Raises UserError for a spec of metrics with a name that none of these tasks has. Needs no data."""
    known = {name: metric for task in tasks for name, metric in BY_TASK[task].items()}
    for call in spec.parse(text):
        spec.lookup(call, known, "metric")


def own_names(sums: Mapping[str, Any]) -> list[str]:
    """The names of the metrics among the sums that a method's `evaluate` returns."""
    return [name.removeprefix(OWN) for name in sums if name.startswith(OWN)]


def reserved_names(task: Task, predicts: bool = True) -> re.Pattern[str]:
    """The names of metrics that results use themselves; those of a run that `predicts` nothing are fewer."""
    reported = ("loss", "nll", *REPORTED[task]) if predicts else ()
    of_evaluate = ("scores", "confusion", "classes", "class_(names|examples|predicted|correct)", "target_names")
    return re.compile("|".join(("examples", *reported, "ensemble_.*", ".*_std", *of_evaluate)))


# The task in messages: "a run with …".
TASK_NAMES = {Task.CLASSES: "classes", Task.SOFT: "classes", Task.MULTILABEL: "several labels"}


def parse_best(text: str, key: str = "checkpoint.best") -> tuple[str, float]:
    """Returns the metric that `text` of a config's `key` names, and 1.0 if its greatest value is best, else -1.0.

    For example ("test/my_error", -1.0) for "min:test/my_error". Raises UserError for a metric of unknown direction.
    """
    direction, _, name = text.partition(":")
    if direction not in BEST.values():
        direction, name = (BEST | TARGET_METRICS).get(text.partition("/")[2], ""), text
    if not direction:
        raise UserError(f"{key}={text!r}: write 'min:{name}' if the smallest value of your metric is best, "
                        f"or 'max:{name}' if the greatest is")  # fmt: skip
    return name, 1.0 if direction == "max" else -1.0


def check_best(
    text: str, key: str, task: Task, outputs: Sequence[str], own: Collection[str] = (), predicts: bool = True
) -> None:
    """Raises UserError if `text` of a config's `key` names a metric that the run's evaluation does not report.

    `outputs` names its classes. `own` are the whole-set metrics and those of the method; a run without `predicts` has
    no others.
    """
    kind = text.partition("/")[2]
    reported = ("loss", "nll", *REPORTED[task]) if predicts else ()
    known = [name for name in (*reported, *filter(None, own)) if name != "top5" or len(outputs) > 5]
    if kind not in known:
        run = TASK_NAMES[task] if predicts else "a method that trains no head"
        fix = f"it has {', '.join(known)}" if known else "it has no metric, so leave this empty"
        raise UserError(f"{key}={text!r}: a run with {run} has no {kind}; {fix}")
