"""The command `show-batch`: a picture of the batch that a step trains on. Nothing is trained."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from imgclf_jax.core import places, sharding, spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import printable
from imgclf_jax.data import sources, stream
from imgclf_jax.losses import Task
from imgclf_jax.programs import Programs, programs_for_images
from imgclf_jax.recipe import check_names
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.step import make_inputs
from imgclf_jax.tools.pages import contact_sheet

_LINES = 4  # numbers or labels below an image


class Shown(NamedTuple):
    """The batch of a step: arrays [b, …] of its examples, in their order."""

    ids: np.ndarray
    epochs: np.ndarray
    names: list[str]  # of their files, or "" where there are none
    arrays: dict[str, np.ndarray]  # those of `step.make_inputs`; with `raw` "image", uint8, and "label"


def main(
    config: ConfigDict, workdir: Workdir | None, step: int, raw: bool, count: int, output: str, format: str
) -> int:
    """Writes the picture of the batch at `step`, its first `count` examples, to `output`, and prints what it shows.

    Of several seeds it is the batch of the first one. The format "json" prints an object with the examples.
    """
    file = places.as_path(output) if output else (workdir.path if workdir else Path()) / f"batch-{step}.png"
    if file.suffix != ".png":
        raise UserError(f"--output={output}: the name of the picture must end in .png")
    check_names(config)
    base = sources.open_data(config)
    images = stream.train_images(sources.take_split(base, config.data.train), config, base)
    programs = programs_for_images(config, images, sharding.make_mesh(jax.devices()[:1]))
    total = programs.recipe.total
    if step >= total:
        raise UserError(f"--step={step}: the run has {total} steps, 0 to {total - 1}")
    batch = batch_at(programs, images, step, raw)
    count = min(count, len(batch.ids))
    pixels, how = visible(batch.arrays["image"][:count], config.augment)
    examples, task = describe(batch, programs.recipe.data.class_names, count), programs.recipe.task
    captions = [[f"id {example['id']}", *_label_lines(example, task)] for example in examples]
    picture = contact_sheet.draw(pixels, captions)
    content = io.BytesIO()
    picture.save(content, "PNG")
    file.parent.mkdir(parents=True, exist_ok=True)
    with places.replacing(file) as temporary:
        temporary.write_bytes(content.getvalue())
    if format == "json":
        print(json.dumps({"step": step, "seed": config.seed, "file": str(file), "pixels": how, "examples": examples},
                         indent=2))  # fmt: skip
        return 0
    of = f"the first {count} of " if count < len(batch.ids) else ""
    seeds = f" of the first of {config.num_seeds} seeds" if config.num_seeds > 1 else ""
    epochs = sorted(set(batch.epochs.tolist()))
    print(f"step {step} of {total}{seeds}: {of}{len(batch.ids)} examples, of epoch {' and '.join(map(str, epochs))} "
          f"(0 is the first), ids {', '.join(map(str, batch.ids[:6].tolist()))}, …")  # fmt: skip
    print(f"pixels {list(pixels.shape[1:])}: {how}")
    by = contact_sheet.scale(max(pixels.shape[1:3]))
    shown = "" if by == 1 else f", each image {by:.2g} times as large"
    print(f"the picture is in {printable(str(file))}{shown}")
    return 0


def batch_at(programs: Programs, images: stream.Images, step: int, raw: bool = False) -> Shown:
    """The batch that the step trains on, of the first seed: what `step.make_train_step` gives the model.

    With `raw` it is what the step is given: images uint8[b, h, w, c].
    """
    recipe, spec_of = programs.recipe, programs.stream
    only = dataclasses.replace(spec_of, num_seeds=1)
    [(_, chunk)] = stream.train_chunks(images, only, [range(step, step + 1)], 1, prefetch=0)
    batch = jax.tree.map(lambda values: values[0], chunk)
    at = stream.positions(range(step, step + 1), only.batch_size, np.arange(only.batch_size, dtype=np.int64))
    ids = images.ids(only.seed, at)
    name = getattr(images.source, "name", lambda i: "")
    names = [found if "/" in (found := name(int(i))) else "" for i in ids]  # else it is a number once more
    if not raw:
        with programs.tracing():
            inputs = jax.jit(make_inputs(recipe.augment(train=True), recipe.mix, recipe.method))
            batch = inputs(np.uint32(only.seed), np.int32(step), batch)
    own = {name: np.asarray(values) for name, values in batch.items() if not isinstance(values, dict)}
    if "image" not in own or own["image"].shape[:1] != ids.shape:
        raise UserError(f"method={programs.recipe.config.method!r} gives its loss no batch of {len(ids)} images as "
                        "\"image\"; pass --raw to see the batch before augmentation")  # fmt: skip
    return Shown(ids, images.epochs(at), names, own)


def describe(batch: Shown, class_names: tuple[str, ...], count: int) -> list[dict[str, Any]]:
    """{"id", "epoch", "file", "label": {class: share}} of each of the first `count` examples; shares add up to 1.

    Of targets it is "target": {name: number} in place of the label.
    """
    rows = []
    for i in range(count):
        file = {"file": batch.names[i]} if batch.names[i] else {}
        known = {"id": int(batch.ids[i]), "epoch": int(batch.epochs[i]), **file}
        if "target" in batch.arrays:
            target = zip(class_names, batch.arrays["target"][i], strict=True)
            rows.append({**known, "target": {name: float(f"{x:.7g}") for name, x in target}})
            continue
        own = class_names[batch.arrays["label"][i]]
        label = {own: 1.0}
        if "other" in batch.arrays:
            weight, other = float(batch.arrays["weight"][i]), class_names[batch.arrays["other"][i]]
            label = {own: 1.0} if other == own else {own: weight, other: 1 - weight}
        rows.append({**known, "label": label})
    return rows


def _label_lines(example: dict[str, Any], task: Task) -> list[str]:
    """`cat`, or `0.70  cat` and `+ 0.30  dog`; a share that is 0 to two digits is left out.

    Of targets the numbers with their names, a few at most; of labels those that are there, the greatest first.
    """
    if "target" in example:
        numbers = list(example["target"].items())
        if task is not Task.REGRESSION:
            numbers = sorted(((name, x) for name, x in numbers if x >= 0.005), key=lambda one: -one[1])
            if all(x == 1 for _, x in numbers):
                return [*(printable(name) for name, _ in numbers[:_LINES]), *["…"] * (len(numbers) > _LINES)]
        lines = [f"{x:.4g}  {printable(name)}" for name, x in numbers[:_LINES]]
        return [*lines, *["…"] * (len(numbers) > _LINES)]
    shares = {name: share for name, share in example["label"].items() if share >= 0.005}
    if len(shares) == 1:
        return [*map(printable, shares)]
    return [f"{'+ ' * bool(i)}{share:.2f}  {printable(name)}" for i, (name, share) in enumerate(shares.items())]


def visible(images: np.ndarray, augment: str) -> tuple[np.ndarray, str]:
    """Images [b, h, w, c], uint8 or float, to uint8 as they can be looked at, and how, in words.

    Floats are turned back by the `normalize` of the spec `augment`. Of ops of one's own that scale otherwise nothing is
    known: then the least value is black, and the greatest white.
    """
    if images.dtype == np.uint8:
        return images, "0 to 255, as the host ops give them"
    calls = [call for call in spec.parse(augment) if call.name == "normalize"]
    own = any(":" in call.name for call in spec.parse(augment))
    if len(calls) > 1 or own:
        low, high = float(images.min()), float(images.max())
        shown = (images - low) / max(high - low, 1e-12)
        return np.rint(255 * shown).astype(np.uint8), f"{low:.4g} is shown black, {high:.4g} white"
    given = dict(zip(("mean", "std"), calls[0].args, strict=False)) | calls[0].kwargs if calls else {}
    mean, std = (np.asarray(given.get(name, default), np.float32) for name, default in (("mean", 0.0), ("std", 1.0)))
    scaled = images * std + mean
    outside = float(np.mean((scaled < -1e-3) | (scaled > 1 + 1e-3)))
    how = f"turned back by x * {std.tolist()} + {mean.tolist()}; " if given else ""
    how += "0 is shown black, 1 white"
    if outside:
        how += f", and {outside:.1%} of the values, which lie outside, as these"
    return np.rint(255 * scaled.clip(0, 1)).astype(np.uint8), how
