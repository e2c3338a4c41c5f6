"""Metrics of a whole evaluation set, from labels i32[n] and probabilities f32[n, classes]: scikit-learn's."""

import statistics
import warnings
from collections.abc import Callable

import numpy as np

from imgclf_jax import spec
from imgclf_jax.errors import UserError


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


METRICS = {"auc": auc, "balanced_accuracy": balanced_accuracy, "f1": f1}


def build(text: str) -> dict[str, Callable[[np.ndarray, np.ndarray], float]]:
    """The metrics that a spec such as `auc|f1` names, by their names; the user's own by import path."""
    found = {}
    for call in spec.parse(text):
        name = call.name.rpartition(":")[2]
        if name in found:
            raise UserError(f"metrics={text!r} names {name} twice")
        found[name] = spec.bind(call, METRICS, "metric", given=("labels", "probabilities"))
    return found
