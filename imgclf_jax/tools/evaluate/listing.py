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
from imgclf_jax.scores.classification import FromLogits, Scores


def rows(
    name: str, examples: Sequence[str], labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str], top: int,
    step: int = 0, from_logits: FromLogits | None = None,
) -> Iterable[JsonObject]:  # fmt: skip
    """Yields a row for each example of the set `name`: its index or file, its label, and its `top` classes.

    labels i32[n], probabilities f32[n, classes]; `from_logits` as in `scores.Scores`. The predicted class comes first;
    ties between the others are in class order. An example without a prediction is not correct. Each row ends with the
    checkpoint's `step`.
    """
    scores = Scores(labels, probabilities, from_logits)
    known = from_logits and from_logits.log_odds
    order = np.array(probabilities if known is None else known)
    predicts = np.flatnonzero(scores.predicted >= 0)
    order[predicts, scores.predicted[predicts]] = np.inf
    best = np.argsort(-order, axis=1, kind="stable")[:, :top]
    columns = (examples, labels, scores.ranks == 0, best, probabilities)
    for example, label, correct, ranked, own in zip(*columns, strict=True):
        row = {"set": name, "example": example, "label": classes[label], "correct": bool(correct)}
        for rank, c in enumerate(ranked, 1):
            row |= {f"class_{rank}": classes[c], f"probability_{rank}": float(own[c])}
        yield row | {"step": step}


def target_rows(
    name: str, examples: Sequence[str], targets: np.ndarray, outputs: np.ndarray, names: Sequence[str],
    exact: np.ndarray, step: int = 0,
) -> Iterable[JsonObject]:  # fmt: skip
    """Yields a row for each example of the set `name`, with `target[NAME]` and `probability[NAME]` of each class.

    targets, outputs f32[n, k]. `exact` bool[n] says whether all labels of an example are predicted and becomes
    `correct`. Rows end as those of `rows` do.
    """
    for i, example in enumerate(examples):
        row: JsonObject = {"set": name, "example": example, "correct": bool(exact[i])}
        row |= {f"target[{key}]": float(x) for key, x in zip(names, targets[i], strict=True)}
        row |= {f"probability[{key}]": float(x) for key, x in zip(names, outputs[i], strict=True)}
        yield row | {"step": step}


def write(path: Path, table: Sequence[JsonMapping]) -> None:
    """Writes rows with the same keys atomically, as CSV or JSON lines by the file's suffix.

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
