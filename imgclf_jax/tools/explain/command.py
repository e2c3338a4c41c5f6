"""The command `explain`: heatmaps of the image regions that a prediction depends on."""

import re
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from imgclf_jax.core import paths, terminal
from imgclf_jax.core.errors import UserError, check_choice
from imgclf_jax.core.text import decimals
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.explain.explanations import build, draw
from imgclf_jax.tools.pages import inputs
from imgclf_jax.trained import load_trained


def main(
    config: ConfigDict, workdir: Workdir | None, files: list[str], checkpoint: str, format: str, method: str,
    layer: str, window: int, output: str, **others: str,
) -> int:  # fmt: skip
    """Draws a heatmap for each image into the folder `output`; returns 1 if an image fails, else 0.

    - `workdir` is the run to use; None uses the weights that `init_from` names.
    - `others["class"]` names the class to explain, "" the predicted one.
    - `method`, `layer` and `window` are those of `explanations.build`. The heatmap of several seeds is their mean.

    Raises UserError for an unknown class or layer, and for a method that does not fit the network.
    """
    wanted = others["class"]
    folder = Path(output or "explained")
    images = inputs.find(files)
    model = load_trained(config, workdir, checkpoint)
    model.programs.check_predicts()
    if wanted:
        check_choice("class", wanted, model.class_names)
    method, explain = build(model, method, layer, window)
    folder.mkdir(parents=True, exist_ok=True)
    results = inputs.Results(images, model.stream("ranked", images), "explaining")

    def records() -> Iterator[JsonObject]:
        taken: set[Path] = set()
        for file, result in results:
            if isinstance(result, UserError):
                continue
            probabilities, ranking = result
            label = model.class_names.index(wanted) if wanted else int(ranking.argmax())
            name, probability = model.class_names[label], float(probabilities[label])
            title = f"{Path(file).name}: {name}, probability {decimals(probability)}"
            picture, values = draw(method, explain, model.prepare(file), label, title)
            target = _name_picture(folder, file, method, wanted, taken)
            paths.write_atomically(target, picture)
            yield {"file": file, "class": name, "probability": float(f"{probability:.7g}"), "method": method,
                   "greatest": float(values.max()), "picture": str(target)}  # fmt: skip

    if format == "json":
        terminal.print_json(list(records()))
    else:
        rows = ([r["file"], r["class"], decimals(r["probability"]), f"{r['greatest']:.3g}", r["picture"]]
                for r in records())  # fmt: skip
        terminal.print_table(["file", "class", "probability", "largest value", "figure"], rows)
    return int(results.failed > 0)


def _name_picture(folder: Path, file: str, method: str, wanted: str, taken: set[Path]) -> Path:
    """Names an image's heatmap `STEM.METHOD.png`, with a number if another image of this call has that name."""
    stem = ".".join(re.sub(r"[^\w.+-]", "_", part) for part in (Path(file).stem, wanted) if part)
    numbers = ("", *(f"-{number}" for number in range(2, len(taken) + 2)))
    target = next(name for number in numbers if (name := folder / f"{stem}{number}.{method}.png") not in taken)
    taken.add(target)
    return target
