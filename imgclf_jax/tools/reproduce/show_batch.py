"""The command `show-batch`: draws the batch that a step trains on, without training."""

import dataclasses
import io
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import datasets
from imgclf_jax.augment.ops import to_pixels
from imgclf_jax.core import paths, sharding, terminal
from imgclf_jax.core.errors import UsageError, UserError
from imgclf_jax.core.text import printable
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.data import stream
from imgclf_jax.data.resizing import to_uint8
from imgclf_jax.programs import Programs, programs_for_images
from imgclf_jax.recipe import check_names
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.step import make_inputs
from imgclf_jax.tools.pages import contact_sheet

_LINES = 4  # most numbers or labels below an image


class Shown(NamedTuple):
    """The batch of a step: arrays [b, …] in the order of its examples."""

    ids: np.ndarray
    epochs: np.ndarray
    names: list[str]  # file names, or ""
    arrays: dict[str, np.ndarray]  # of `step.make_inputs`; with `raw`, "image" uint8 and "label"


def main(
    config: ConfigDict, workdir: Workdir | None, step: int, raw: bool, count: int, output: str, format: str
) -> int:
    """Draws the first `count` examples of the batch at `step` (of the first seed) to `output`, and describes them.

    The format "json" prints an object with the examples.
    """
    file = paths.as_path(output) if output else (workdir.path if workdir else Path()) / f"batch-{step}.png"
    if file.suffix != ".png":
        raise UsageError(f"--output={output}: the name must end in .png")
    check_names(config)
    images = datasets.open_train_images(config)
    programs = programs_for_images(config, images, sharding.make_mesh(jax.devices()[:1]))
    total = programs.recipe.total
    if step >= total:
        raise UserError(f"--step={step}: must be 0 to {total - 1}, because the run has {total} steps")
    batch = batch_at(programs, images, step, raw)
    count = min(count, len(batch.ids))
    pixels = batch.arrays["image"][:count]
    if pixels.dtype != np.uint8:
        pixels = to_pixels(pixels, config.augment)
    examples = describe(batch, programs.recipe.data.class_names, count)
    captions = [[f"id {example['id']}", *_label_lines(example)] for example in examples]
    content = io.BytesIO()
    contact_sheet.draw(to_uint8(pixels), captions).save(content, "PNG")
    file.parent.mkdir(parents=True, exist_ok=True)
    paths.write_atomically(file, content.getvalue())
    if format == "json":
        terminal.print_json({"step": step, "seed": config.seed, "file": str(file), "examples": examples})
        return 0
    seeds = f", the first of {config.num_seeds} seeds" if config.num_seeds > 1 else ""
    print(f"step {step} of {total}{seeds}: the first {count} of {len(batch.ids)} examples, ids "
          f"{', '.join(map(str, batch.ids[:6].tolist()))}, …")  # fmt: skip
    print(f"wrote {printable(str(file))}")
    return 0


def batch_at(programs: Programs, images: stream.Images, step: int, raw: bool = False) -> Shown:
    """Returns the batch that a step trains on, of the first seed, as `step.make_train_step` passes it to the model.

    With `raw` it is the step's input, with images uint8[b, h, w, c].
    """
    recipe = programs.recipe
    only = dataclasses.replace(programs.stream, num_seeds=1)
    [(_, batch)] = stream.batches(images, only, [step], prefetch=0)
    at = step * only.batch_size + np.arange(only.batch_size, dtype=np.int64)
    ids = images.sampler.ids(only.seed, at)
    names = [name if "/" in (name := images.source.example_name(int(i))) else "" for i in ids]  # others repeat the id
    if not raw:
        with programs.tracing():
            inputs = jax.jit(make_inputs(recipe.augment(train=True), recipe.mix, recipe.method))
            batch = inputs(np.uint32(only.seed), np.int32(step), batch)
    own = {name: np.asarray(values) for name, values in batch.items() if not isinstance(values, dict)}
    if "image" not in own or own["image"].shape[:1] != ids.shape:
        raise UserError(f"method={programs.recipe.config.method!r} passes no \"image\" of {len(ids)} images to its "
                        "loss; pass --raw to see the batch before augmentation")  # fmt: skip
    return Shown(ids, at // images.sampler.epoch, names, own)


def describe(batch: Shown, class_names: tuple[str, ...], count: int) -> list[JsonObject]:
    """Returns {"id", "epoch", "file", "label": {class: weight}} for the first `count` examples; weights sum to 1.

    Examples with targets have "target": {name: number} instead of the label.
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


def _label_lines(example: JsonObject) -> list[str]:
    """Formats a label: `cat`, or `0.70  cat` and `+ 0.30  dog`, without weights that round to 0.

    For targets, formats the present labels, largest first.
    """
    if "target" in example:
        numbers = sorted(((name, x) for name, x in example["target"].items() if x >= 0.005), key=lambda one: -one[1])
        certain = all(x == 1 for _, x in numbers)
        lines = [printable(name) if certain else f"{x:.4g}  {printable(name)}" for name, x in numbers[:_LINES]]
        return [*lines, *["…"] * (len(numbers) > _LINES)]
    shares = {name: share for name, share in example["label"].items() if share >= 0.005}
    if len(shares) == 1:
        return [*map(printable, shares)]
    return [f"{'+ ' * bool(i)}{share:.2f}  {printable(name)}" for i, (name, share) in enumerate(shares.items())]
