"""Draws where in an image a trained model finds its class."""

import functools
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import loading
from imgclf_jax.analysis import attribution, heatmap
from imgclf_jax.commands import inputs
from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.core.text import printable, utf8
from imgclf_jax.run import terminal
from imgclf_jax.run.provenance import write_atomically
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.trained import Trained, report_host_ops

Record = dict[str, Any]

_FIRST_ROWS = 1000  # of a table, whose columns are as wide as these need
TITLES = {
    "gradcam": "Grad-CAM: what speaks for the class",
    "rollout": "attention rollout: what is looked at, for any class",
    "occlusion": "occlusion: how far the probability falls",
}


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
    model = loading.of(config, workdir, checkpoint)
    report_host_ops(model.programs)
    if wanted and wanted not in model.class_names:
        raise UserError(unknown("class", wanted, model.class_names))
    method, explain = build(model, method, layer, window, bool(wanted))
    folder = Path(output or "explained")
    folder.mkdir(parents=True, exist_ok=True)
    counts = {"all": 0, "failed": 0}

    def records() -> Iterator[Record]:
        taken: set[Path] = set()
        for (file, _), result in terminal.count(inputs.computed(model, "predict", images), "images"):
            counts["all"] += 1
            if isinstance(result, UserError):
                counts["failed"] += 1
                print(f"error: {printable(str(result))}", file=sys.stderr)
                continue
            label = model.class_names.index(wanted) if wanted else int(result.argmax())
            name, probability = model.class_names[label], float(result[label])
            pixels = model.prepare(file)
            values = explain(pixels, label)
            title = [f"{utf8(Path(file).name)}: {name}, probability {probability:.4f}", TITLES[method]]
            picture = heatmap.draw(pixels, values, method == "occlusion", [printable(line) for line in title])
            target = _target(folder, file, method, wanted, taken)
            content = io.BytesIO()
            picture.save(content, "PNG")
            write_atomically(target, content.getvalue())
            yield {"file": utf8(file), "class": name, "probability": round(probability, 6), "method": method,
                   "greatest": float(values.max()), "picture": str(target)}  # fmt: skip

    if format == "json":
        print(json.dumps(list(records()), indent=2))
    else:
        rows = ([r["file"], r["class"], f"{r['probability']:.4f}", r["method"], f"{r['greatest']:.3g}", r["picture"]]
                for r in records())  # fmt: skip
        columns = ["file", "class", "probability", "method", "greatest value", "picture"]
        terminal.print_long_table(columns, rows, _FIRST_ROWS)
    if counts["failed"]:
        print(f"error: {counts['failed']} of {counts['all']} images could not be explained", file=sys.stderr)
    return 1 if counts["failed"] else 0


def build(
    model: Trained, method: str = "auto", layer: str = "", window: int = 0, for_class: bool = False
) -> tuple[str, Callable[[np.ndarray, int], np.ndarray]]:
    """(the method, a function of uint8[h, w, c] as the model takes it and of a class that gives the map [h', w']).

    `method` is "gradcam", "rollout", "occlusion", or "auto": the one that suits the network, or, with `for_class`, the
    one of them that tells classes apart. `layer` is for Grad-CAM, `window` for occlusion.
    """
    programs, params = model.programs, model.state.evaluated
    recipe, classifier = programs.recipe, attribution.without_remat(programs.recipe.model)
    one_seed = jax.tree.map(lambda x: x[0], params) if recipe.num_seeds > 1 else params
    with programs.tracing():
        variables = {"params": one_seed[0], **one_seed[1]}
        seen = attribution.look(classifier, variables, recipe.data.image_shape)
    if method == "auto":
        method = "gradcam" if layer else "occlusion" if window else seen.best
        method = "occlusion" if method == "rollout" and for_class else method
    if method == "rollout" and for_class:
        raise UserError("rollout shows what the network looks at, which is the same for every class: drop --class, or "
                        "take --method=occlusion")  # fmt: skip
    for flag, value, wants in (("layer", layer, "gradcam"), ("window", window, "occlusion")):
        if value and method != wants:
            raise UserError(f"--{flag} is for --method={wants}, and this is {method}; drop one of the two")
    if method == "occlusion":
        size = sharding.round_up(min(model.config.batch_size, 128), programs.mesh)
        probabilities = functools.partial(_probabilities, model, size)
        return method, lambda pixels, label: attribution.occlusion(probabilities, pixels, label, window, size)
    augment, seeds = recipe.augment(train=False), recipe.num_seeds
    pure = (
        attribution.make_gradcam(classifier, augment, attribution.choose_layer(seen, layer), seeds)
        if method == "gradcam"
        else attribution.make_rollout(classifier, augment, seen, seeds)
    )

    @jax.jit
    def traced(*args: Any) -> jax.Array:
        with programs.tracing():
            return pure(*args)

    return method, lambda pixels, label: np.asarray(traced(*params, pixels[None], np.array([label], np.int32)))[0]


def _probabilities(model: Trained, size: int, images: np.ndarray) -> np.ndarray:
    """f32[b, classes] of up to `size` images uint8[b, h, w, c], as `predict` has them. All calls are of one shape."""
    mesh = model.programs.mesh
    batch = np.concatenate([images, np.zeros((size - len(images), *images.shape[1:]), np.uint8)])
    out = model.programs.predict(*model.state.evaluated, sharding.put_batch({"image": batch}, mesh)["image"])
    return np.asarray(jax.device_get(out))[: len(images)]


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
