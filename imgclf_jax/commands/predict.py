"""Classifies new images with a trained run, by the class names and host ops that its work directory recorded."""

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from imgclf_jax.commands.trained import convert, report_host_ops, restore
from imgclf_jax.core import named_warnings, processes, sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import printable, utf8
from imgclf_jax.data import decode, image_check, image_files
from imgclf_jax.programs import Programs
from imgclf_jax.run import writers
from imgclf_jax.run.workdir import Workdir

log = logging.getLogger(__name__)


def find_files(paths: list[str]) -> list[Path]:
    """The files at `paths`: each file that is named, and the images inside each directory, in the order of their names.

    What is an image says `image_files`, as for training; how many other files there are is logged. Raises UserError for
    a path that does not exist or is no regular file, and for a directory without images.
    """
    files: list[Path] = []
    for text in paths:
        path = Path(text)
        if path.is_dir():
            found = image_files.find(path)
            if counted := image_files.counted(found.strays):
                log.info("%s: not used: %s", path, counted)
            inside = sorted([*found.images, *found.lost], key=lambda name: name.split("/"))
            if not inside:
                raise UserError(f"predict: the directory {text!r} holds no images")
            files += [path / name for name in inside]
        elif path.is_file():
            files.append(path)
        elif path.exists():
            raise UserError(f"predict: {text!r} is a pipe, socket or device; name image files or directories")
        else:
            raise UserError(f"predict: there is no file or directory {text!r} (working directory: {Path.cwd()})")
    return files


def predict(programs: Programs, state: Any, files: list[Path]) -> Iterator[tuple[Path, np.ndarray | UserError]]:
    """(file, probabilities f32[classes]) for each file, or (file, error) for one that cannot be classified."""
    report_host_ops(programs)
    ops, _ = decode.build(programs.preprocess_eval)
    mesh = programs.mesh
    batch_size = sharding.round_up(min(programs.recipe.config.batch_size, 128), mesh)

    def load(index: int) -> np.ndarray | UserError:
        try:
            seed = programs.recipe.config.seed
            with named_warnings.about(lambda: str(files[index])):
                image = ops(decode.read_file(files[index]), seed, index)
        except (OSError, UserError) as e:
            return UserError(f"{files[index]}: {e}")
        if image.shape != programs.recipe.data.image_shape:
            return UserError(f"{files[index]}: preprocess gives {image.shape}, not {programs.recipe.data.image_shape}")
        return image

    rows = sharding.rows_here(batch_size, mesh)  # what this process reads of each batch
    for start in range(0, len(files), batch_size):
        batch = np.zeros((rows.size, *programs.recipe.data.image_shape), np.uint8)  # one shape, so one compilation
        here: dict[int, str] = {}
        for place, i in enumerate(start + rows[start + rows < len(files)]):
            image = load(i)
            if isinstance(image, np.ndarray):
                batch[place] = image
            else:
                here[int(i)] = str(image)
        images = sharding.put_batch({"image": batch}, mesh)["image"]
        probabilities = np.asarray(jax.device_get(programs.predict(*state.evaluated, images)))
        errors = {int(i): text for some in processes.gather("reading images", here) for i, text in some.items()}
        for row, i in enumerate(range(start, min(start + batch_size, len(files)))):
            if i in errors:
                yield files[i], UserError(errors[i])
            elif np.isnan(probabilities[row]).any():
                what = "the model gives NaN for this image; its weights may hold NaN, so try another --checkpoint"
                yield files[i], UserError(f"{files[i]}: {what}")
            else:
                yield files[i], probabilities[row]


def main(config: ConfigDict, workdir: Workdir | None, which: str, format: str, paths: list[str], top_k: int) -> int:
    """The command `predict`: prints the `top_k` classes of each image; 1 if an image could not be classified, else 0.

    With `data.unreadable` "skip", unreadable files of directories do not count: one line says how many there are.

    It uses the run in `workdir`. If that is None, it uses the weights that `init_from` names and the classes of the
    config's source. The loss says what probabilities are (see `losses.Link`): after `sigmoid` they do not add up to 1.
    """
    if not paths:
        raise UserError(
            "predict: name at least one image file or directory: launch.py predict FILE|DIR … --workdir DIR"
        )
    files = find_files(paths)
    if workdir:
        programs, state, _ = restore(config, workdir, which)
    else:
        programs, state = convert(config)
    names = programs.recipe.data.class_names
    records: list[dict[str, Any]] = []
    failed, skipped = 0, {}
    formats = decode.formats_of(programs.preprocess_eval)
    may_skip = set(files) - set(map(Path, paths)) if config.data.unreadable == "skip" else set()
    for file, result in predict(programs, state, files):
        if isinstance(result, UserError):
            if file in may_skip and not image_check.readable(file, formats):
                skipped[str(file)] = str(result).removeprefix(f"{file}: ")
            else:
                failed += 1
                if not processes.index():
                    print(f"error: {printable(str(result))}", file=sys.stderr)
            records.append({"file": utf8(str(file)), "error": str(result)})
        else:
            best = np.argsort(-result, kind="stable")[: max(1, top_k)]
            top = [{"class": names[c], "probability": round(float(result[c]), 6)} for c in best]
            records.append({"file": utf8(str(file)), "predictions": top})
    if processes.index():
        return 1 if failed else 0
    if format == "json":
        print(json.dumps(records, indent=2))
    else:
        _print_table([r for r in records if "predictions" in r])
    if skipped:
        listed = image_check.write_list("predict", skipped)
        log.warning("unreadable files left out: %d; all are listed in %s", len(skipped), listed or "no file, since "
                    "the cache folder cannot be written")  # fmt: skip
    if failed:
        others = "; the others are above" if failed < len(files) else ""
        print(f"error: {failed} of {len(files)} images could not be classified{others}", file=sys.stderr)
    return 1 if failed else 0


def _print_table(records: list[dict[str, Any]]) -> None:
    if not records:
        return
    ranks = [f"top {rank + 1}" for rank in range(len(records[0]["predictions"]))]
    rows = [[r["file"], *(f"{p['class']} {p['probability']:.4f}" for p in r["predictions"])] for r in records]
    writers.print_table(["file", *ranks], rows)
