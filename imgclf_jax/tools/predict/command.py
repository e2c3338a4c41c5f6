"""Predicts new images with a trained run, by the class names and host ops that its work directory recorded."""

import csv
import json
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from ml_collections import ConfigDict

from imgclf_jax.cli import inputs
from imgclf_jax.core import processes
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import printable, utf8
from imgclf_jax.data import image_check
from imgclf_jax.losses import Task
from imgclf_jax.run import terminal
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.trained import load_trained, report_host_ops

log = logging.getLogger(__name__)

# {"file", "predictions": [{"class", "probability"}]}, {"file", "values": {target: number}} or {"file", "error"}; of
# several labels also "probabilities" f32[classes]
Record = dict[str, Any]

_FIRST_ROWS = 1000  # of a table, whose columns are as wide as these need


def main(
    config: ConfigDict, workdir: Workdir | None, paths: list[str], checkpoint: str, format: str, top_k: int,
    threshold: str = "",
) -> int:  # fmt: skip
    """The command `predict`: prints the `top_k` classes of each image; 1 if an image could not be classified, else 0.

    Of several labels it prints all classes from the `threshold` on, of a regression the values: `Trained.describe`.

    The formats are "table", "json" (a list), "jsonl" (an object a line) and "csv". Results are printed in the order of
    the images, as they are computed. With `data.unreadable` "skip", unreadable files of directories do not count: one
    line says how many there are.

    It uses the run in `workdir`. If that is None, it uses the weights that `init_from` names and the classes of the
    config's source. The loss says what probabilities are (see `losses.Link`): after `sigmoid` they do not add up to 1.
    """
    images = inputs.find("predict", paths)
    model = load_trained(config, workdir, checkpoint)
    report_host_ops(model.programs)
    names, several = model.class_names, model.task is Task.MULTILABEL
    top_k, least = min(top_k, len(names)), model.thresholds(threshold)
    counts = {"all": 0, "failed": 0}
    skipped: dict[str, str] = {}
    errors: list[Exception] = []  # what ended the images before their end, as a folder that cannot be read

    def records() -> Iterator[Record]:
        for (file, found), result in terminal.count(inputs.compute(model, "predict", images), "images"):
            counts["all"] += 1
            if not isinstance(result, UserError):
                more = {"probabilities": result} if several and format == "csv" else {}
                yield {"file": utf8(file), **model.describe(result, top_k, least), **more}
                continue
            passed_over = found and config.data.unreadable == "skip"
            if passed_over and not image_check.readable(Path(file), model.programs.preprocess_eval):
                skipped[file] = str(result).removeprefix(f"{file}: ")
            else:
                counts["failed"] += 1
                if not processes.index():
                    print(f"error: {printable(str(result))}", file=sys.stderr)
            yield {"file": utf8(file), "error": str(result)}

    if processes.index():
        deque(inputs.until_error(records(), errors), maxlen=0)
    else:
        columns: Columns = OfLabels(names) if several else OfClasses(top_k)
        columns = OfNumbers(names) if model.task is Task.REGRESSION else columns
        PRINT[format](inputs.until_error(records(), errors), columns)
        if skipped:
            listed = image_check.write_list("predict", skipped)
            log.warning("unreadable files left out: %d; all are listed in %s", len(skipped), listed or "no file, since "
                        "the cache folder cannot be written")  # fmt: skip
        if counts["failed"]:
            others = "; the others are above" if counts["failed"] < counts["all"] else ""
            print(f"error: {counts['failed']} of {counts['all']} images could not be classified{others}",
                  file=sys.stderr)  # fmt: skip
    if errors:
        raise errors[0]
    return 1 if counts["failed"] else 0


class Columns(Protocol):
    """How a task's predictions stand in columns."""

    @property
    def table(self) -> list[str]: ...

    @property
    def csv(self) -> list[str]: ...

    def in_table(self, record: Record) -> list[str]: ...

    def in_csv(self, record: Record, shown: Callable[[str], str]) -> list[Any]: ...


class OfClasses:
    """The likeliest classes, the first one first."""

    def __init__(self, top_k: int):
        self.table = [f"top {rank}" for rank in range(1, top_k + 1)]
        self.csv = [f"{what}_{rank}" for rank in range(1, top_k + 1) for what in ("class", "probability")]

    def in_table(self, record: Record) -> list[str]:
        return [f"{p['class']} {p['probability']:.4f}" for p in record["predictions"]]

    def in_csv(self, record: Record, shown: Callable[[str], str]) -> list[Any]:
        return [value for p in record["predictions"] for value in (shown(p["class"]), p["probability"])]


class OfLabels:
    """The predicted labels together; in CSV also the probability of each class."""

    def __init__(self, names: Sequence[str]):
        self.table = ["labels"]
        self.csv = ["labels", *(f"probability[{name}]" for name in names)]

    def in_table(self, record: Record) -> list[str]:
        return [", ".join(f"{p['class']} {p['probability']:.4f}" for p in record["predictions"])]

    def in_csv(self, record: Record, shown: Callable[[str], str]) -> list[Any]:
        labels = "|".join(shown(p["class"]) for p in record["predictions"])
        return [labels, *(round(float(p), 6) for p in record["probabilities"])]


class OfNumbers:
    """The value of each target."""

    def __init__(self, names: Sequence[str]):
        self.table = list(names)
        self.csv = [f"value[{name}]" for name in names]

    def in_table(self, record: Record) -> list[str]:
        return [f"{value:.5g}" for value in record["values"].values()]

    def in_csv(self, record: Record, shown: Callable[[str], str]) -> list[Any]:
        return list(record["values"].values())


def _print_table(records: Iterator[Record], columns: Columns) -> None:
    rows = ([r["file"], *columns.in_table(r)] for r in records if "error" not in r)
    terminal.print_long_table(["file", *columns.table], rows, _FIRST_ROWS)


def _print_json(records: Iterator[Record], columns: Columns) -> None:
    between = "["
    for record in records:
        print(between + "\n  " + json.dumps(record, indent=2).replace("\n", "\n  "), end="")
        between = ","
    print("[]" if between == "[" else "\n]")


def _print_lines(records: Iterator[Record], columns: Columns) -> None:
    for record in records:
        print(json.dumps(record))


def _print_csv(records: Iterator[Record], columns: Columns) -> None:
    """With names as they are for a program, and escaped for a terminal."""
    shown: Callable[[str], str] = printable if sys.stdout.isatty() else str
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["file", "error", *map(shown, columns.csv)])
    for record in records:
        found = [""] * len(columns.csv) if "error" in record else columns.in_csv(record, shown)
        writer.writerow([shown(record["file"]), shown(record.get("error", "")), *found])


PRINT: dict[str, Callable[[Iterator[Record], Columns], None]] = {
    "table": _print_table,
    "json": _print_json,
    "jsonl": _print_lines,
    "csv": _print_csv,
}
