"""Metrics of evaluation: sums and counts that add up over batches, devices and hosts, and whole-set metrics.

Whole-set metrics, such as AUC, need all labels and probabilities of an evaluation set and are computed on the host in
float64. In multi-label classification, so is everything but the loss and the likelihood.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
CONFUSION_CLASSES = 1000  # the most classes with scores by class; predictions of more may not fit into memory

AnyPredictions = Predictions | TargetPredictions
_OF_OUTPUTS = ("targets", "probabilities", "ranking", "log_odds")  # fields [..., n, k]; the others [..., n]


def predict(
    logits: jax.Array, wanted: jax.Array, link: Link, mask: jax.Array, task: Task = Task.CLASSES
) -> AnyPredictions:
    """Returns the predictions that logits f32[..., b, k] make of labels i32[b] or targets f32[b, k], by the task.

    SOFT targets are replaced by their dominant labels.
    """
    outputs = link.probabilities(logits.astype(jnp.float32))
    log_odds = link.log_odds(logits.astype(jnp.float32))
    if task is Task.MULTILABEL:
        return TargetPredictions(wanted, outputs, log_odds, mask)
    labels = dominant_labels(wanted) if task is Task.SOFT else wanted
    return Predictions(labels, outputs, predicted_classes(logits), label_ranks(logits, labels), log_odds, mask)


def concatenate(batches: Sequence[AnyPredictions]) -> AnyPredictions:
    """Concatenates the predictions of all batches on the host, without the padding."""

    def join(name: str) -> np.ndarray:
        rest = (slice(None),) if name in _OF_OUTPUTS else ()
        return np.concatenate([getattr(batch, name)[..., batch.mask, *rest] for batch in batches], -1 - len(rest))

    return batches[0]._replace(mask=None, **{name: join(name) for name in batches[0]._fields if name != "mask"})


def dominant_labels(targets: jax.Array) -> jax.Array:
    """i32[b]: the class with the greatest share in each row of f32[b, classes]; the first wins a tie."""
    return jnp.argmax(targets, -1).astype(jnp.int32)


def task_sums(
    logits: jax.Array, wanted: jax.Array, loss: jax.Array, link: Link, mask: jax.Array, task: Task = Task.CLASSES
) -> Sums:
    """Metric sums over the examples of a batch whose mask bool[b] is True; it is False for padding.

    logits f32[b, k]; wanted i32[b] for CLASSES, else f32[b, k]; loss f32[b]. The sums are

    - `examples`, `loss`, and `nll`, which for SOFT is the cross-entropy with the target;
    - `nonfinite`: examples with a NaN or infinite probability;
    - `kl` for SOFT: KL(target || prediction);
    - `correct`, and with six or more classes `top5`, unless the task is MULTILABEL: labels, or dominant labels, that
      are the greatest logit or among the five greatest (see `label_ranks`).
    """
    finite = jnp.all(jnp.isfinite(link.probabilities(logits)), -1)  # infinite logits may have finite probabilities
    counts = {"examples": mask, "nonfinite": mask & ~finite}
    values = {"loss": loss, "nll": link.nll(logits, wanted)}
    if task is Task.SOFT:
        values["kl"] = values["nll"] + jnp.sum(jax.scipy.special.xlogy(wanted, wanted), -1)
    if task is not Task.MULTILABEL:
        ranks = label_ranks(logits, dominant_labels(wanted) if task is Task.SOFT else wanted)
        counts |= {"correct": mask & (ranks == 0)} | ({"top5": mask & (ranks < 5)} if logits.shape[-1] > 5 else {})
    return {
        **{name: jnp.sum(which, dtype=jnp.int32) for name, which in counts.items()},
        **{name: jnp.sum(jnp.where(mask, value, 0.0)) for name, value in values.items()},
    }


type WholeSetMetric = Callable[[Any], float]  # of Predictions or TargetPredictions
_MEANS = {"accuracy": "correct", "loss": "loss", "nll": "nll", "kl": "kl", "top5": "top5"}  # metric: sum


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

    `whole_set` metrics, by name, are of the `predictions`. Sums of several seeds are [seeds + 1, …], the ensemble last;
    each metric is the mean over seeds, `NAME_std` its sample standard deviation, and `ensemble_NAME` the ensemble's.
    """
    if np.ndim(sums["examples"]):
        by_seed = ({name: value[i] for name, value in sums.items()} for i in range(len(sums["examples"])))
        *each, ensemble = [summarize(one, predictions and predictions.for_seed(i), whole_set)
                           for i, one in enumerate(by_seed)]  # fmt: skip
        names = [name for name in ensemble if name != "examples" and OWN + name not in sums]
        return mean_over_seeds(each) | {f"ensemble_{name}": ensemble[name] for name in names}
    n = int(sums["examples"])
    out: dict[str, float] = {"examples": n}
    out |= {name: float(sums[key]) / n for name, key in _MEANS.items() if key in sums}
    out |= {name.removeprefix(OWN): float(value) / n for name, value in sums.items() if name.startswith(OWN)}
    return out | {name: metric(predictions) for name, metric in (whole_set or {}).items() if predictions}


def reported(sums: Mapping[str, Any], whole_set: Mapping[str, WholeSetMetric]) -> list[str]:
    """The names of the metrics that `summarize` makes of `sums`. Raises UserError for a method's that means another."""
    own = [name.removeprefix(OWN) for name in sums if name.startswith(OWN)]
    for name in own:
        if name in whole_set or RESERVED.fullmatch(name):
            raise UserError(f"the method's evaluate returns {name!r}, a name of another result; rename it")
    return [*(name for name, key in _MEANS.items() if key in sums), *own, *whole_set]


WHOLE_SET = classification.METRICS | multilabel.METRICS  # the values of the config key `metrics`

# 1.0 if the greatest value of a metric is best, else -1.0. A user's own metric has "min:" or "max:" before its name.
_GREATEST = ("accuracy", "top5", *multilabel.SCORES, *WHOLE_SET)
BEST = dict.fromkeys(("loss", "nll", "kl"), -1.0) | dict.fromkeys(_GREATEST, 1.0)

# Names in the results of an evaluation that no metric of a user or a method can have.
RESERVED = re.compile("|".join((*BEST, "examples", "scores", "confusion", "classes", "class_names", "target_names",
                                "ensemble_.*", ".*_std")))  # fmt: skip


def build_whole_set(text: str, task: Task = Task.CLASSES) -> dict[str, WholeSetMetric]:
    """Returns the whole-set metrics that a spec such as `auc|f1` names, by name, after those of every multi-label run.

    A user's metric, named by import path, is a function of labels i32[n] and probabilities f32[n, classes]; for
    MULTILABEL, of targets and probabilities f32[n, k]. Raises UserError for a name that is unknown or taken.
    """
    several = task is Task.MULTILABEL
    scores = multilabel.SCORES if several else {}
    whole_set: dict[str, WholeSetMetric] = {name: functools.partial(_score, score) for name, score in scores.items()}
    for call in spec.parse(text):
        name, is_own = call.name.rpartition(":")[2], ":" in call.name
        if name in whole_set or (is_own and RESERVED.fullmatch(name)):
            raise UserError(f"metrics={text!r}: results have a metric {name} already; give each metric its own name")
        leading = ("targets" if several else "labels", "probabilities") if is_own else ("predictions",)
        metric = spec.bind(call, multilabel.METRICS if several else classification.METRICS, "metric", leading)
        whole_set[name] = _own_metric(str(call), metric) if is_own else metric
    return whole_set


def _own_metric(text: str, metric: Function) -> WholeSetMetric:
    """The user's metric of the spec `text` as a function of predictions. Its first call checks that it is pure."""
    checked = False

    def compute(predictions: AnyPredictions) -> float:
        nonlocal checked
        first = metric(*predictions[:2])
        if np.shape(first) or not hasattr(first, "__float__"):
            raise UserError(f"metrics={text!r} returns {first!r:.80}; return one number")
        again = first if checked else metric(*predictions[:2])
        if not np.array_equal(first, again, equal_nan=True):
            raise UserError(f"metrics={text!r} gives {first}, and {again} in a second call for the same predictions; "
                            "it must not draw, count or change its arguments")  # fmt: skip
        checked = True
        return float(first)

    return compute


def _score(score: Function, predictions: TargetPredictions) -> float:
    return float(score(predictions, np.ones((1, len(predictions.targets))))[0])
