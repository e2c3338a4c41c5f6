"""The command `predict`: predictions of a trained model for new images."""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from imgclf_jax.core import terminal
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import decimals, printable
from imgclf_jax.core.typing import Json, JsonObject
from imgclf_jax.losses import Task
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.pages import inputs
from imgclf_jax.trained import Trained, load_trained

# {"file", "predictions": [{"class", "probability"}]}, {"file", "values": {target: number}} or {"file", "error"};
# multi-label records also have "probabilities" f32[classes]
type Record = JsonObject


def main(
    config: ConfigDict, workdir: Workdir | None, paths: list[str], checkpoint: str, format: str, top_k: int,
    threshold: str = "",
) -> int:  # fmt: skip
    """Prints the predictions for each image, in order; returns 1 if an image fails, else 0.

    These are the `top_k` classes, or the classes of a multi-label model from `threshold` on (see `Trained.describe`).
    With a `sigmoid` loss, probabilities do not sum to 1 (see `losses.Link`).

    - `workdir` is the run to use; None uses the weights that `init_from` names and the classes of the config's source.
    - `format` is "json" (a list, once all are computed), or "table", "jsonl" (an object per line) or "csv".
    """
    images = inputs.find(paths)
    model = load_trained(config, workdir, checkpoint)
    top_k, thresholds = min(top_k, len(model.class_names)), _parse_thresholds(threshold, model)
    with_all = model.task is Task.MULTILABEL and format == "csv"
    results = inputs.Results(images, model.stream("ranked", images), "predicting")

    def records() -> Iterator[Record]:
        for image, result in results:
            if isinstance(result, UserError):
                yield {"file": image, "error": str(result)}
                continue
            more = {"probabilities": result[0]} if with_all else {}
            yield {"file": image, **model.describe(result, top_k, thresholds), **more}

    if format == "json":
        terminal.print_json(list(records()))
    elif format == "jsonl":
        for record in records():
            print(json.dumps(record))
    elif format == "csv":
        _print_csv(records(), make_columns(model, top_k))
    else:
        columns = make_columns(model, top_k)
        rows = ([r["file"], *columns.table_cells(r)] for r in records() if "error" not in r)
        terminal.print_table(["file", *columns.table], rows)
    return int(results.failed > 0)


def _parse_thresholds(text: str, model: Trained) -> np.ndarray:
    """Parses "0.5", or one number per class separated by commas, to f64[] or f64[classes]; "" is 0.5.

    Raises UserError for anything else, and unless the model is multi-label.
    """
    if text and model.task is not Task.MULTILABEL:
        raise UserError(f"--threshold={text}: it is for several labels, and this model predicts one class; drop it")
    try:
        found = np.array([float(part) for part in (text or "0.5").split(",")])
    except ValueError:
        found = np.array([np.nan])
    if len(found) not in (1, len(model.class_names)) or not ((found >= 0) & (found <= 1)).all():
        raise UserError(f"--threshold={text}: must be a number from 0 to 1, or {len(model.class_names)} "
                        "numbers separated by commas, one per class")  # fmt: skip
    return found[0] if len(found) == 1 else found


class Columns(NamedTuple):
    """The columns of a task's predictions, in tables and in CSV, and the functions from a record to their cells."""

    table: list[str]
    csv: list[str]
    table_cells: Callable[[Record], list[str]]
    csv_cells: Callable[[Record], list[Json]]


def make_columns(model: Trained, top_k: int) -> Columns:
    """The most likely classes, in order; the labels in one column, in CSV with the probability of each."""

    def shown(prediction: Record) -> str:
        return f"{prediction['class']} {decimals(prediction['probability'])}"

    names = model.class_names
    if model.task is Task.MULTILABEL:
        return Columns(
            ["labels"], ["labels", *(f"probability[{name}]" for name in names)],
            lambda record: [", ".join(map(shown, record["predictions"]))],
            lambda record: ["|".join(p["class"] for p in record["predictions"]),
                            *(float(f"{p:.7g}") for p in record["probabilities"])],
        )  # fmt: skip
    ranks = range(1, top_k + 1)
    return Columns(
        [f"top {rank}" for rank in ranks], [f"{name}_{rank}" for rank in ranks for name in ("class", "probability")],
        lambda record: [*map(shown, record["predictions"])],
        lambda record: [value for p in record["predictions"] for value in (p["class"], p["probability"])],
    )  # fmt: skip


def _print_csv(records: Iterator[Record], columns: Columns) -> None:
    """Prints CSV, with names escaped only for a terminal."""
    shown: Callable[[str], str] = printable if sys.stdout.isatty() else str
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["file", "error", *map(shown, columns.csv)])
    for record in records:
        cells = [""] * len(columns.csv) if "error" in record else columns.csv_cells(record)
        row = [record["file"], record.get("error", ""), *cells]
        writer.writerow([shown(cell) if isinstance(cell, str) else cell for cell in row])
