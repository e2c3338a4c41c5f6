"""Recall, precision and confusions of each class, of class or multi-label predictions."""

from collections.abc import Mapping, Sequence

import numpy as np

from imgclf_jax.core.text import decimals
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.scores.classification import Predictions
from imgclf_jax.scores.multilabel import TargetPredictions, quotient

THRESHOLD_NOTE = ("Precision, recall and F1 are at a threshold of 0.5. The best threshold has the greatest F1 on these "
                  "very examples; choose it on a validation set.")  # fmt: skip


def counts(predictions: Predictions) -> dict[str, np.ndarray]:
    """Counts the predictions by class.

    Returns `examples`, `predicted` and `correct`, int[classes], and `confusion`, int[label, prediction]. An example
    without a prediction is in no column.
    """
    classes = predictions.probabilities.shape[1]
    found = np.zeros((classes, classes + 1), int)  # the last column, of index -1, is for no prediction
    np.add.at(found, (predictions.labels, predictions.predicted), 1)
    confusion = found[:, :-1]
    return {"examples": found.sum(1), "predicted": confusion.sum(0), "correct": confusion.diagonal(),
            "confusion": confusion}  # fmt: skip


def table(names: Sequence[str], counts: Mapping[str, np.ndarray]) -> tuple[list[str], list[list[str]]]:
    """Returns the columns and a row for each class: examples, recall, precision and the most frequent confusion.

    Of more than 100 classes, those without examples and predictions have none.
    """
    rows = []
    for i, name in enumerate(names):
        examples, predicted, right = (counts[key][i] for key in ("examples", "predicted", "correct"))
        if len(names) > 100 and not examples and not predicted:
            continue
        wrong = counts["confusion"][i] * (np.arange(len(names)) != i)
        rows.append([name, str(examples), decimals(right / examples) if examples else "",
                     decimals(right / predicted) if predicted else "",
                     f"{names[int(wrong.argmax())]} ({wrong.max()})" if wrong.any() else ""])  # fmt: skip
    return ["class", "examples", "recall", "precision", "most often taken for"], rows


def multilabel(predictions: TargetPredictions, names: Sequence[str]) -> list[JsonObject]:
    """Returns a dict per class: examples, average precision, precision, recall, F1 and best threshold.

    Unknown values, such as the recall of a class that no example has, are None.
    """
    one = np.ones((1, len(predictions.targets)))
    true, predicted, both = predictions.counts(one)[:, 0]
    columns = {
        "average_precision": predictions.average_precision(one)[0], "precision": quotient(both, predicted),
        "recall": quotient(both, true), "f1": quotient(2 * both, true + predicted),
        "best_threshold": best_thresholds(predictions),
    }  # fmt: skip
    return [
        {"class": name, "examples": int((predictions.targets[:, i] >= 0.5).sum())}
        | {key: None if np.isnan(values[i]) else float(values[i]) for key, values in columns.items()}
        for i, name in enumerate(names)
    ]


def multilabel_table(predictions: TargetPredictions, names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Returns the column names and a row per class: see `multilabel`."""
    columns = ["class", "examples", "average precision", "precision", "recall", "F1", "best threshold"]
    rows = [["" if value is None else decimals(value) if isinstance(value, float) else str(value)
             for value in one.values()] for one in multilabel(predictions, names)]  # fmt: skip
    return columns, rows


def best_thresholds(predictions: TargetPredictions) -> np.ndarray:
    """f64[classes]: the threshold with the greatest F1 on these examples; NaN for a class that no example has.

    Choose thresholds on a validation set: on the test set they are biased.
    """
    probabilities, true = predictions.probabilities, predictions.targets >= 0.5
    out = np.full(true.shape[1], np.nan)
    if np.isnan(probabilities).any():
        return out
    for c in np.flatnonzero(true.any(0)):
        order = np.argsort(-probabilities[:, c], kind="stable")
        values, correct = probabilities[order, c], np.cumsum(true[order, c])
        ends = np.append(np.flatnonzero(values[1:] != values[:-1]), len(values) - 1)
        f1 = 2 * correct[ends] / (ends + 1 + correct[-1])
        out[c] = values[ends[np.argmax(f1)]]
    return out
