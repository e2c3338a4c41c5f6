"""Predictions of random models, and their scores by scikit-learn."""

import numpy as np
from sklearn import metrics as sk

from imgclf_jax.scores.classification import Predictions, label_ranks, predicted_classes


def example(n, classes, seed=0, sharpness=1.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes)) * 1.5
    labels = rng.integers(0, classes, n)
    logits[np.arange(n), labels] += sharpness
    probabilities = np.exp(logits)
    return labels, np.round(probabilities / probabilities.sum(1, keepdims=True), 2)  # rounded, so that some are equal


def predictions(labels, probabilities):
    """Those of probabilities alone, which order the examples as their log-odds do."""
    labels = np.asarray(labels)
    ranks = label_ranks(probabilities, labels)
    return Predictions(labels, probabilities, predicted_classes(probabilities), ranks, log_odds=probabilities)


def score(labels, probabilities):
    found = predictions(labels, probabilities).compute(np.ones((1, len(labels))))
    return {name: float(value[0]) for name, value in found.items()}


def by_sklearn(labels, probabilities, weights=None):
    classes = probabilities.shape[1]
    predicted = probabilities.argmax(1)
    own = {"sample_weight": weights}
    macro = {"average": "macro", "zero_division": 0, **own}
    first = 1 if classes == 2 else 0
    areas = [sk.roc_auc_score(labels == c, probabilities[:, c], **own) for c in range(first, classes)]
    squares = ((probabilities - np.eye(classes)[labels]) ** 2).sum(1) / (2 if classes == 2 else 1)
    out = {
        "accuracy": sk.accuracy_score(labels, predicted, **own),
        "macro_precision": sk.precision_score(labels, predicted, **macro),
        "macro_recall": sk.recall_score(labels, predicted, **macro),
        "macro_f1": sk.f1_score(labels, predicted, **macro),
        "auc": np.mean(areas),
        "brier": np.average(squares, weights=weights),
        "calibration_error": calibration(labels, probabilities, weights),
    }
    if classes > 5:
        top5 = [label in np.argsort(-row, kind="stable")[:5] for label, row in zip(labels, probabilities, strict=True)]
        out["top5"] = np.average(top5, weights=weights)
    return out


def calibration(labels, probabilities, weights):
    """By the definition, bin by bin."""
    weights = np.ones(len(labels)) if weights is None else weights
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    error = 0.0
    for m in range(15):
        inside = (confidence * 15 > m) & (confidence * 15 <= m + 1) if m else confidence * 15 <= 1
        if weights[inside].sum():
            share = weights[inside].sum() / weights.sum()
            means = [np.average(values[inside], weights=weights[inside]) for values in (confidence, right)]
            error += share * abs(means[0] - means[1])
    return error
