"""Recall, precision and confusions of each class, from the counts of an evaluation."""

from collections.abc import Mapping, Sequence

import numpy as np

from imgclf_jax.core.text import decimals
from imgclf_jax.metrics import Sums


def counts(sums: Sums, num_seeds: int) -> dict[str, np.ndarray]:
    """Selects the counts by class from the sums of an evaluation (see `metrics.classification_sums`).

    They are `class_examples`, `class_predicted` and `class_correct`, int64[classes], and `confusion`, int64[label,
    prediction], unless there are very many classes. For several seeds they are those of the ensemble.
    """
    kept = {name: value for name, value in sums.items() if name.startswith("class_") or name == "confusion"}
    return kept if num_seeds == 1 else {name: value[-1] for name, value in kept.items()}


def table(names: Sequence[str], counts: Mapping[str, np.ndarray]) -> tuple[list[str], list[list[str]]]:
    """Returns the columns and a row for each class: examples, recall, precision and the most frequent confusion.

    The last column needs `confusion`.
    """
    confusion = counts.get("confusion")
    columns = ["class", "examples", "recall", "precision", *([] if confusion is None else ["most often taken for"])]
    rows = []
    for i, name in enumerate(names):
        examples, predicted, right = (counts[f"class_{key}"][i] for key in ("examples", "predicted", "correct"))
        row = [name, str(examples), decimals(right / examples) if examples else ""]
        row.append(decimals(right / predicted) if predicted else "")
        if confusion is not None:
            wrong = confusion[i] * (np.arange(len(names)) != i)
            row.append(f"{names[int(wrong.argmax())]} ({wrong.max()})" if wrong.any() else "")
        rows.append(row)
    return columns, rows


def most_confused(confusion: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """Returns (label, prediction, count) of the `most` most frequent confusions in int[label, prediction].

    Ties are ordered by label, then by prediction.
    """
    wrong = confusion * ~np.eye(len(confusion), dtype=bool)
    order = np.argsort(-wrong.ravel(), kind="stable")[:most]
    pairs = [divmod(int(index), len(confusion)) for index in order]
    return [(*pair, int(wrong[pair])) for pair in pairs if wrong[pair]]
