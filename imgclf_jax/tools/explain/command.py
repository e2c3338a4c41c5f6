"""The command `explain`: heatmaps of the image regions that a prediction depends on."""

import functools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from imgclf_jax.cli import inputs
from imgclf_jax.core import paths, terminal
from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.core.text import decimals, utf8
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.explain.explanations import TITLES, build, draw
from imgclf_jax.trained import load_trained, report_host_ops

type Record = JsonObject


def main(
    config: ConfigDict, workdir: Workdir | None, files: list[str], checkpoint: str, format: str, method: str,
    layer: str, window: int, output: str, **others: str,
) -> int:  # fmt: skip
    """Draws a heatmap for each image into the folder `output`; returns 1 if an image fails, else 0.

    - `workdir` is the run to use; None uses the weights that `init_from` names.
    - `others["class"]` names the class to explain, "" the predicted one.
    - `method`, `layer` and `window` are those of `explanations.build`. The heatmap of several seeds is their mean.

    Raises UserError for an unknown class or layer, and for a method that does not fit the network or the class.
    """
    wanted = others["class"]
    folder = Path(output or "explained")
    skip = functools.partial(_is_figure, os.path.realpath(folder))
    images = inputs.find(files, skip)
    if folder.is_file():
        raise UserError(f"explain: --output={folder} is a file; name a folder for the heatmaps")
    model = load_trained(config, workdir, checkpoint)
    model.programs.check_predicts()
    report_host_ops(model.programs)
    if wanted and wanted not in model.class_names:
        raise UserError(unknown("class", wanted, model.class_names))
    method, explain = build(model, method, layer, window, bool(wanted))
    folder.mkdir(parents=True, exist_ok=True)
    results = inputs.Results(images, model.stream("ranked", [image.path for image in images]), "explaining")

    def records() -> Iterator[Record]:
        taken: set[Path] = set()
        for (file, _), result in results:
            if isinstance(result, UserError):
                continue
            probabilities, ranking = result
            label = model.class_names.index(wanted) if wanted else int(ranking.argmax())
            name, probability = model.class_names[label], float(probabilities[label])
            title = f"{utf8(Path(file).name)}: {name}, probability {decimals(probability)}"
            picture, values = draw(method, explain, model.prepare(file), label, title)
            target = _name_picture(folder, file, method, wanted and name_class(wanted, model.class_names), taken)
            paths.write_atomically(target, picture)
            yield {"file": utf8(file), "class": name, "probability": float(f"{probability:.7g}"), "method": method,
                   "greatest": float(values.max()), "picture": str(target)}  # fmt: skip

    if format == "json":
        terminal.print_json(list(records()))
    else:
        rows = ([r["file"], r["class"], decimals(r["probability"]), r["method"], f"{r['greatest']:.3g}",
                 r["picture"]] for r in records())  # fmt: skip
        columns = ["file", "class", "probability", "method", "greatest value", "picture"]
        terminal.print_table(columns, rows)
    return int(results.failed > 0)


def _is_figure(folder: str, path: str) -> bool:
    """Whether a file in the output folder is named like its figures, such as those of an earlier call."""
    named = path.endswith(tuple(f".{method}.png" for method in TITLES))
    return named and os.path.realpath(os.path.dirname(path)) == folder


def name_class(name: str, class_names: Sequence[str]) -> str:
    """A class as part of a file name, with its index if another class would have the same."""
    safe = _safe(name)
    alone = [*map(_safe, class_names)].count(safe) == 1
    return safe if alone else f"{safe}.{class_names.index(name)}"


def _safe(name: str) -> str:
    return re.sub(r"[^\w.+-]", "_", name)


def _name_picture(folder: Path, file: str, method: str, wanted: str, taken: set[Path]) -> Path:
    """Names an image's heatmap `STEM.METHOD.png`, with a number if another image of this call has that name."""
    stem = _safe(Path(utf8(file)).stem) + (f".{wanted}" if wanted else "")
    for number in range(1, len(taken) + 2):
        target = folder / f"{stem}{f'-{number}' if number > 1 else ''}.{method}.png"
        if target not in taken:
            break
    taken.add(target)
    return target
