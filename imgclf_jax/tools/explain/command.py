"""Draws where in an image a trained model finds its class."""

import json
import re
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from imgclf_jax.cli import inputs
from imgclf_jax.core import processes
from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.core.text import printable, utf8
from imgclf_jax.losses import Task
from imgclf_jax.run import terminal
from imgclf_jax.run.provenance import write_atomically
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.explain.explanations import build, drawn
from imgclf_jax.trained import load_trained, report_host_ops

Record = dict[str, Any]

_FIRST_ROWS = 1000  # of a table, whose columns are as wide as these need


def main(
    config: ConfigDict, workdir: Workdir | None, paths: list[str], checkpoint: str, format: str, method: str,
    layer: str, window: int, output: str, **others: str,
) -> int:  # fmt: skip
    """The command `explain`: draws a heat map of each image into the folder `output`; 1 if an image failed, else 0.

    `others["class"]` names the class that is explained, where it is not the predicted one. It uses the run in
    `workdir`, or, if that is None, the weights that `init_from` names. The class and its probability are those of
    `predict`. A map of several seeds is the mean of the seeds' maps. Raises UserError for a class or a layer that is
    not there, and for a method that does not suit the network or what is asked of it.
    """
    images = inputs.find("explain", paths)
    wanted = others["class"]
    model = load_trained(config, workdir, checkpoint)
    model.programs.check_predicts()
    report_host_ops(model.programs)
    numbers = model.task is Task.REGRESSION
    if wanted and wanted not in model.class_names:
        raise UserError(unknown("target" if numbers else "class", wanted, model.class_names))
    if numbers and not wanted:
        if len(model.class_names) > 1:
            raise UserError(f"explain: this model predicts {len(model.class_names)} numbers; name the one to explain: "
                            f"--class={model.class_names[0]!r}")  # fmt: skip
        wanted = model.class_names[0]
    method, explain = build(model, method, layer, window, bool(wanted))
    folder = Path(output or "explained")
    folder.mkdir(parents=True, exist_ok=True)
    counts = {"all": 0, "failed": 0}
    errors: list[Exception] = []  # what ended the images before their end

    def records() -> Iterator[Record]:
        taken: set[Path] = set()
        for (file, _), result in terminal.count(inputs.compute(model, "predict", images), "images"):
            counts["all"] += 1
            if isinstance(result, UserError):
                counts["failed"] += 1
                if not processes.index():
                    print(f"error: {printable(str(result))}", file=sys.stderr)
                continue
            label = model.class_names.index(wanted) if wanted else int(result.argmax())
            name, probability = model.class_names[label], float(result[label])
            says = f"{utf8(Path(file).name)}: {name}, {'value' if numbers else 'probability'} {probability:.4f}"
            picture, values = drawn(method, explain, model.prepare(file), label, says, numbers)
            target = _target(folder, file, method, wanted, taken)
            if not processes.index():
                write_atomically(target, picture)
            what = {"target": name, "value": float(f"{probability:.7g}")} if numbers else {
                "class": name, "probability": round(probability, 6)}  # fmt: skip
            yield {"file": utf8(file), **what, "method": method,
                   "greatest": float(values.max()), "picture": str(target)}  # fmt: skip

    if processes.index():
        deque(records(), maxlen=0)
        return 1 if counts["failed"] else 0
    if format == "json":
        print(json.dumps(list(inputs.until_error(records(), errors)), indent=2))
    else:
        names = ("target", "value") if numbers else ("class", "probability")
        rows = ([r["file"], r[names[0]], f"{r[names[1]]:.4f}", r["method"], f"{r['greatest']:.3g}", r["picture"]]
                for r in inputs.until_error(records(), errors))  # fmt: skip
        columns = ["file", *names, "method", "greatest value", "picture"]
        terminal.print_long_table(columns, rows, _FIRST_ROWS)
    if counts["failed"]:
        print(f"error: {counts['failed']} of {counts['all']} images could not be explained", file=sys.stderr)
    if errors:
        raise errors[0]
    return 1 if counts["failed"] else 0


def _target(folder: Path, file: str, method: str, wanted: str, taken: set[Path]) -> Path:
    """The picture of an image: `STEM.METHOD.png`, with a number where another image of this call has that name."""
    stem = Path(utf8(file)).stem + (f".{wanted}" if wanted else "")
    stem = re.sub(r"[^\w.+-]", "_", stem)
    for number in range(1, len(taken) + 2):
        target = folder / f"{stem}{f'-{number}' if number > 1 else ''}.{method}.png"
        if target not in taken:
            break
    taken.add(target)
    return target
