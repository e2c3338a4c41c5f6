"""Classifies new images with a trained run, by the class names and host ops that its work directory recorded."""

import csv
import json
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from imgclf_jax import loading
from imgclf_jax.commands import inputs
from imgclf_jax.core import processes
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import printable, utf8
from imgclf_jax.data import image_check
from imgclf_jax.run import terminal
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.trained import report_host_ops

log = logging.getLogger(__name__)

Record = dict[str, Any]  # {"file", "predictions": [{"class", "probability"}]}, or {"file", "error"}

_FIRST_ROWS = 1000  # of a table, whose columns are as wide as these need


def main(
    config: ConfigDict, workdir: Workdir | None, paths: list[str], checkpoint: str, format: str, top_k: int
) -> int:
    """The command `predict`: prints the `top_k` classes of each image; 1 if an image could not be classified, else 0.

    The formats are "table", "json" (a list), "jsonl" (an object a line) and "csv". Results are printed in the order of
    the images, as they are computed. With `data.unreadable` "skip", unreadable files of directories do not count: one
    line says how many there are.

    It uses the run in `workdir`. If that is None, it uses the weights that `init_from` names and the classes of the
    config's source. The loss says what probabilities are (see `losses.Link`): after `sigmoid` they do not add up to 1.
    """
    images = inputs.find("predict", paths)
    model = loading.of(config, workdir, checkpoint)
    report_host_ops(model.programs)
    top_k = min(top_k, len(model.class_names))
    counts = {"all": 0, "failed": 0}
    skipped: dict[str, str] = {}
    errors: list[Exception] = []  # what ended the images before their end, as a folder that cannot be read

    def records() -> Iterator[Record]:
        for (file, found), result in terminal.count(inputs.computed(model, "predict", images), "images"):
            counts["all"] += 1
            if not isinstance(result, UserError):
                yield {"file": utf8(file), "predictions": model.best(result, top_k)}
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
        PRINT[format](inputs.until_error(records(), errors), top_k)
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


def _print_table(records: Iterator[Record], top_k: int) -> None:
    rows = ([r["file"], *(f"{p['class']} {p['probability']:.4f}" for p in r["predictions"])]
            for r in records if "predictions" in r)  # fmt: skip
    terminal.print_long_table(["file", *(f"top {rank + 1}" for rank in range(top_k))], rows, _FIRST_ROWS)


def _print_json(records: Iterator[Record], top_k: int) -> None:
    between = "["
    for record in records:
        print(between + "\n  " + json.dumps(record, indent=2).replace("\n", "\n  "), end="")
        between = ","
    print("[]" if between == "[" else "\n]")


def _print_lines(records: Iterator[Record], top_k: int) -> None:
    for record in records:
        print(json.dumps(record))


def _print_csv(records: Iterator[Record], top_k: int) -> None:
    """With names as they are for a program, and escaped for a terminal."""
    shown: Callable[[str], str] = printable if sys.stdout.isatty() else str
    ranks = range(1, top_k + 1)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["file", "error", *(f"{what}_{rank}" for rank in ranks for what in ("class", "probability"))])
    for record in records:
        found = [value for p in record.get("predictions", []) for value in (shown(p["class"]), p["probability"])]
        writer.writerow([shown(record["file"]), shown(record.get("error", "")), *(found or [""] * 2 * top_k)])


PRINT: dict[str, Callable[[Iterator[Record], int], None]] = {
    "table": _print_table,
    "json": _print_json,
    "jsonl": _print_lines,
    "csv": _print_csv,
}
