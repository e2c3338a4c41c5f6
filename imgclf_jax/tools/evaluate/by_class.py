"""What is right and wrong of each class, from the counts of an evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def counts(sums: Mapping[str, Any], num_seeds: int) -> dict[str, np.ndarray]:
    """Of the sums of an evaluation, see `metrics.classification_sums`, those by class; of several seeds the ensemble's.

    They are `class_examples`, `class_predicted` and `class_correct`, int64[classes], and, unless there are very many
    classes, `confusion`, int64[label, prediction].
    """
    found = {name: value for name, value in sums.items() if name.startswith("class_") or name == "confusion"}
    return found if num_seeds == 1 else {name: value[-1] for name, value in found.items()}


def table(names: Sequence[str], counts: Mapping[str, np.ndarray]) -> tuple[list[str], list[list[str]]]:
    """The columns, and a row for each class.

    Recall is the share of the class's examples that are predicted right, precision the share of the predictions of the
    class that are right. The last column, which other class its examples are most often taken for, needs `confusion`.
    """
    confusion = counts.get("confusion")
    columns = ["class", "examples", "recall", "precision", *([] if confusion is None else ["most often taken for"])]
    rows = []
    for i, name in enumerate(names):
        examples, predicted, right = (counts[f"class_{key}"][i] for key in ("examples", "predicted", "correct"))
        row = [name, str(examples), f"{right / examples:.4f}" if examples else ""]
        row.append(f"{right / predicted:.4f}" if predicted else "")
        if confusion is not None:
            wrong = confusion[i] * (np.arange(len(names)) != i)
            row.append(f"{names[int(wrong.argmax())]} ({wrong.max()})" if wrong.any() else "")
        rows.append(row)
    return columns, rows


def most_confused(confusion: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """(label, prediction, how many), int[label, prediction], of the most frequent confusions, at most so many.

    Of equal ones those of the first label, and then of the first prediction, come first.
    """
    wrong = confusion * ~np.eye(len(confusion), dtype=bool)
    order = np.argsort(-wrong.ravel(), kind="stable")[:most]
    pairs = [divmod(int(place), len(confusion)) for place in order]
    return [(*pair, int(wrong[pair])) for pair in pairs if wrong[pair]]
