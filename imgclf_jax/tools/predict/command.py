"""The command `predict`: predictions of a trained model for new images."""

import csv
import json
import logging
import sys
from collections.abc import Callable, Iterator

import numpy as np
from ml_collections import ConfigDict

from imgclf_jax.core import terminal
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import decimals, printable
from imgclf_jax.core.typing import Json, JsonObject
from imgclf_jax.losses import Task
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.evaluate import calibrated
from imgclf_jax.tools.pages import inputs
from imgclf_jax.trained import Trained, load_trained

log = logging.getLogger(__name__)

# {"file", "predictions": [{"class", "probability"}]}, {"file", "values": {target: number}} or {"file", "error"};
# multi-label records also have "probabilities" f32[classes]
type Record = JsonObject


def main(
    config: ConfigDict, workdir: Workdir | None, paths: list[str], checkpoint: str, format: str, top_k: int,
    threshold: str = "", temperature: float | None = None, reject: float | None = None, coverage: float | None = None,
) -> int:  # fmt: skip
    """Prints the predictions for each image, in order; returns 1 if an image fails, else 0.

    These are the `top_k` classes, or the classes of a multi-label model from `threshold` on (see `Trained.describe`).
    With a `sigmoid` loss, probabilities do not sum to 1 (see `losses.Link`).

    - `workdir` is the run to use; None uses the weights that `init_from` names and the classes of the config's source.
    - `temperature` divides the logits of the probabilities, instead of the run's calibration.
    - `reject` and `coverage` add a `decision` and a `set` to each record: see `_doubts`.
    - `format` is "json" (a list, once all are computed), or "table", "jsonl" (an object per line) or "csv".
    """
    images = inputs.find(paths)
    model = load_trained(config, workdir, checkpoint, temperature)
    doubts = _doubts(model, reject, coverage)
    top_k, thresholds = min(top_k, len(model.class_names)), _parse_thresholds(threshold, model)
    extra = ["decision"] * (reject is not None) + ["set"] * (coverage is not None)
    with_all = model.task is Task.MULTILABEL and format == "csv"
    results = inputs.Results(images, model.stream("ranked", images), "predicting")

    def records() -> Iterator[Record]:
        for image, result in results:
            if isinstance(result, UserError):
                yield {"file": image, "error": str(result)}
                continue
            more = {"probabilities": result[0]} if with_all else {}
            yield {"file": image, **model.describe(result, top_k, thresholds), **doubts(result), **more}

    if format == "json":
        terminal.print_json(list(records()))
    elif format == "jsonl":
        for record in records():
            print(json.dumps(record))
    elif format == "csv":
        _print_csv(records(), model, top_k, extra)
    else:
        labels = ["labels"] if model.task is Task.MULTILABEL else [f"top {rank + 1}" for rank in range(top_k)]
        rows = ([r["file"], *_cells(r, labels), *(_joined(r[name], ", ") for name in extra)]
                for r in records() if "error" not in r)  # fmt: skip
        terminal.print_table(["file", *labels, *extra], rows)
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


def _doubts(model: Trained, reject: float | None, coverage: float | None) -> Callable[[np.ndarray], JsonObject]:
    """Returns the function of an image's outputs f32[2, classes] to its `decision`, None if rejected, and its `set`.

    Raises UserError for impossible rates, and for a model without measurements on `val`.
    """
    numbers, least, below = model.programs.calibration or {}, 0.0, 0.0
    for flag, rate in {"reject": reject, "coverage": coverage}.items():
        if rate is not None and not 0 < rate < 1:
            raise UserError(f"--{flag}={rate:g}: must be above 0 and below 1")
        if rate is not None and not {"confidence", "aps"} <= numbers.keys():
            raise UserError(f"--{flag} needs the run's own calibration: run evaluate --calibrate on it, and pass no "
                            "--temperature")  # fmt: skip
    if reject is not None:
        count = int(reject * len(numbers["confidence"]) + 1e-9)  # none of which is left to rounding
        least = np.mean(numbers["confidence"][count - 1 : count + 1]) if count else 0.0
        measured = np.mean(numbers["confidence"] < least)
        log.info("--reject=%g: undecided below a confidence of %.4f, as %.4f of val are", reject, least, measured)
    if coverage is not None:
        below = calibrated.threshold(numbers["aps"], coverage)
        for name in (name for name in numbers if name.startswith("labels of ")):
            log.info("--coverage=%g: such sets hold %.4f of the %s", coverage, np.mean(numbers[name] < below), name)

    def describe(outputs: np.ndarray) -> JsonObject:
        (probabilities, ranking), out = outputs, dict[str, Json]()
        if reject is not None:
            out["decision"] = None if probabilities.max() < least else model.class_names[ranking.argmax()]
        if coverage is not None:
            [sums] = calibrated.sums_before(probabilities[None])
            out["set"] = [model.class_names[c] for c in np.argsort(sums, kind="stable") if sums[c] < below]
        return out

    return describe


def _joined(value: list[str] | str | None, between: str) -> str:
    return between.join(value) if isinstance(value, list) else value or "undecided"


def _cells(record: Record, labels: list[str]) -> list[str]:
    """The predictions in as many cells of a table as there are `labels`."""
    shown = [f"{p['class']} {decimals(p['probability'])}" for p in record["predictions"]]
    return shown if len(labels) > 1 or len(shown) == 1 else [", ".join(shown)]


def _print_csv(records: Iterator[Record], model: Trained, top_k: int, extra: list[str]) -> None:
    """Prints CSV, with names escaped only for a terminal: the classes in order, or the labels and all probabilities."""
    several, escape = model.task is Task.MULTILABEL, printable if sys.stdout.isatty() else str
    ranked = [f"{kind}_{rank + 1}" for rank in range(top_k) for kind in ("class", "probability")]
    columns = ["labels", *(f"probability[{name}]" for name in model.class_names)] if several else ranked
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["file", "error", *map(escape, columns), *extra])
    for record in records:
        cells: list[Json] = [""] * len(columns + extra)
        if several and "error" not in record:
            cells = ["|".join(p["class"] for p in record["predictions"]),
                     *(float(f"{p:.7g}") for p in record["probabilities"])]  # fmt: skip
        elif "error" not in record:
            cells = [value for p in record["predictions"] for value in (p["class"], p["probability"])]
            cells += [_joined(record[name], "|") for name in extra]
        row = [record["file"], record.get("error", ""), *cells]
        writer.writerow([escape(cell) if isinstance(cell, str) else cell for cell in row])
