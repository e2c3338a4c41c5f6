"""Metrics are sums and counts until the last moment, so that they add up over batches, devices and hosts."""

import statistics
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError

Sums = dict[str, Any]

NO_STEP = 2**31 - 1  # `nonfinite_step` when every step was finite


def classification_sums(logits: jax.Array, labels: jax.Array, losses: jax.Array, mask: jax.Array) -> Sums:
    """Sums over the examples whose mask is 1; the padding's is 0.

    logits f32[b, classes], labels i32[b], losses f32[b], mask bool[b]. `top5` is there from six classes on;
    `confusion` i32[classes, classes] counts (true label, prediction). Of classes that tie the
    first ranks first, and a NaN ranks above all, so that a broken model scores nothing.
    """
    classes = logits.shape[-1]
    prediction = jnp.argmax(logits, -1)
    count = mask.astype(jnp.int32)
    sums = {
        "examples": jnp.sum(count),
        "correct": jnp.sum(jnp.where(prediction == labels, count, 0)),
        "loss": jnp.sum(jnp.where(mask, losses, 0.0)),
        "confusion": jnp.zeros((classes, classes), jnp.int32).at[labels, prediction].add(count),
    }
    if classes > 5:
        own = jnp.take_along_axis(logits, labels[:, None], -1)  # [b, 1]
        tied_before = (logits == own) & (jnp.arange(classes) < labels[:, None])
        above = jnp.sum(~(logits <= own) | tied_before, -1)  # how many classes rank before the true one
        sums["top5"] = jnp.sum(jnp.where(above < 5, count, 0))
    return sums


def scores(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Sums:
    """What metrics of whole sets are computed from: probabilities f32[b, classes], the labels, and which count."""
    return {"probabilities": jax.nn.softmax(logits.astype(jnp.float32)), "labels": labels, "mask": mask}


def summarize(sums: Mapping[str, Any], more: Mapping[str, Callable[..., float]] | None = None) -> dict[str, float]:
    """Host sums to what is reported: examples, accuracy, loss and, where counted, top5 (all as fractions).

    Beside them `more`, of labels and probabilities that lie in the sums. Of several seeds, whose sums are [seeds + 1],
    each is the mean; with it go the standard deviation (`_std`, of a sample), and the ensemble's (`ensemble_`).
    """
    if np.ndim(sums["examples"]):
        *each, together = [
            summarize({name: value[i] for name, value in sums.items()}, more) for i in range(len(sums["examples"]))
        ]
        names = [name for name in together if name != "examples"]
        out = {"examples": together["examples"]}
        for name in names:
            values = [one[name] for one in each]
            out |= {name: statistics.fmean(values), f"{name}_std": statistics.stdev(values)}
        return out | {f"ensemble_{name}": together[name] for name in names}
    n = int(sums["examples"])
    out = {"examples": n, "accuracy": int(sums["correct"]) / n, "loss": float(sums["loss"]) / n}
    if "top5" in sums:
        out["top5"] = int(sums["top5"]) / n
    return out | {name: metric(sums["labels"], sums["probabilities"]) for name, metric in (more or {}).items()}


def auc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Area under the ROC curve, of several classes the mean over them of each against the rest; NaN if one is absent.

    labels i32[n], probabilities f32[n, classes].
    """
    from sklearn.metrics import roc_auc_score

    classes = probabilities.shape[1]
    if len(np.unique(labels)) < classes:
        return float("nan")
    return statistics.fmean(
        roc_auc_score(labels == c, probabilities[:, c]) for c in range(1 if classes == 2 else 0, classes)
    )


def balanced_accuracy(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The mean over the classes that there are of the share of each that is recognized."""
    from sklearn.metrics import balanced_accuracy_score

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")
        return float(balanced_accuracy_score(labels, probabilities.argmax(1)))


def f1(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The mean over the classes of F1, the harmonic mean of precision and recall; of two classes the second's."""
    from sklearn.metrics import f1_score

    average = "binary" if probabilities.shape[1] == 2 else "macro"
    return float(f1_score(labels, probabilities.argmax(1), average=average, zero_division=0))


# Metrics of a whole set, from labels i32[n] and probabilities f32[n, classes].
METRICS = {"auc": auc, "balanced_accuracy": balanced_accuracy, "f1": f1}


def build_whole_set(text: str) -> dict[str, Callable[[np.ndarray, np.ndarray], float]]:
    """The metrics that a spec such as `auc|f1` names, by their names; the user's own by import path."""
    found = {}
    for call in spec.parse(text):
        name = call.name.rpartition(":")[2]
        if name in found:
            raise UserError(f"metrics={text!r} names {name} twice")
        found[name] = spec.bind(call, METRICS, "metric", given=("labels", "probabilities"))
    return found
