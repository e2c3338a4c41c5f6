"""Files of predictions, one row per example: CSV or JSON lines."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from imgclf_jax.core import paths
from imgclf_jax.core.terminal import nonfinite_to_null
from imgclf_jax.core.text import escape_surrogates
from imgclf_jax.core.typing import JsonMapping, JsonObject
from imgclf_jax.metrics import AnyPredictions
from imgclf_jax.scores.multilabel import TargetPredictions


def rows(
    name: str, examples: Sequence[str], predictions: AnyPredictions, classes: Sequence[str], top: int, step: int = 0
) -> Iterable[JsonObject]:
    """Yields a row for each example of the set `name`: its index or file, its label, and its `top` classes.

    The predicted class comes first; ties between the others are in class order. An example without a prediction is not
    correct. With several labels, rows have `target[NAME]` and `probability[NAME]` of each class, and `correct` says
    whether all are predicted. Each row ends with the checkpoint's `step`.
    """
    if isinstance(predictions, TargetPredictions):
        for i, (example, correct) in enumerate(zip(examples, predictions.exact, strict=True)):
            row: JsonObject = {"set": name, "example": example, "correct": bool(correct)}
            for kind, values in (("target", predictions.targets), ("probability", predictions.probabilities)):
                row |= {f"{kind}[{key}]": float(x) for key, x in zip(classes, values[i], strict=True)}
            yield row | {"step": step}
        return
    order = np.array(predictions.log_odds)
    predicts = np.flatnonzero(predictions.predicted >= 0)
    order[predicts, predictions.predicted[predicts]] = np.inf
    best = np.argsort(-order, axis=1, kind="stable")[:, :top]
    columns = (examples, predictions.labels, predictions.ranks == 0, best, predictions.probabilities)
    for example, label, correct, ranked, own in zip(*columns, strict=True):
        row = {"set": name, "example": example, "label": classes[label], "correct": bool(correct)}
        for rank, c in enumerate(ranked, 1):
            row |= {f"class_{rank}": classes[c], f"probability_{rank}": float(own[c])}
        yield row | {"step": step}


def write(path: Path, table: Sequence[JsonMapping]) -> None:
    """Writes rows with the same keys atomically, as CSV if the file's suffix is .csv, else as JSON lines.

    Bytes of names that are not UTF-8 are escaped.
    """
    table = [{escape_surrogates(k): escape_surrogates(v) if isinstance(v, str) else v for k, v in row.items()}
             for row in table]  # fmt: skip
    text = io.StringIO(newline="")
    if path.suffix == ".csv":
        writer = csv.DictWriter(text, list(table[0]) if table else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    else:
        text.writelines(json.dumps(nonfinite_to_null(row), ensure_ascii=False) + "\n" for row in table)
    paths.write_atomically(path, text.getvalue())
