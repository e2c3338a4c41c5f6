"""Exact evaluation: every example counts once, on any number of devices and for any batch size."""

import contextlib
import itertools
import json
import logging
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import metrics
from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources, stream
from imgclf_jax.programs import Programs, of_images
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.checkpoint import Checkpoints
from imgclf_jax.run.provenance import load_data_info
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import format_metrics, print_table
from imgclf_jax.weights import pretrained

log = logging.getLogger(__name__)


def evaluate(programs: Programs, state: Any, images: stream.Images) -> dict[str, Any]:
    """The sums over all of `images`, on the host: integers exact, the loss in float64.

    For the config's `metrics` also `labels` i32[n] and `probabilities` f32[n, classes]. Of several seeds all are
    [seeds + 1, …].
    """
    size, total, scores = programs.steps_per_call, dict[str, Any](), list[dict[str, np.ndarray]]()
    pending: Any = None
    shard = (jax.process_index(), jax.process_count())
    batches = stream.eval_batches(images, programs.eval_batch_size, *shard)
    for some in itertools.batched(batches, size):
        chunk = {name: stream.pad_steps(np.stack([batch[name] for batch in some]), size) for name in some[0]}
        chunk = sharding.put_batch(chunk, programs.mesh, axis=1)
        sums = programs.eval(*state.evaluated, chunk, np.int32(len(some)))
        _add(total, scores, pending)  # fetched while the next chunk is computed
        pending = sums
    _add(total, scores, pending)
    if scores:
        total |= {name: np.concatenate([some[name] for some in scores], -2 if name == "probabilities" else -1)
                  for name in scores[0]}  # fmt: skip
    return total


def evaluate_all(programs: Programs, state: Any, evals: dict[str, stream.Images]) -> dict[str, dict[str, float]]:
    """The metrics of each evaluation set, by its name."""
    return {
        name: metrics.summarize(evaluate(programs, state, images), programs.recipe.whole_set_metrics)
        for name, images in evals.items()
    }


def _add(total: dict[str, Any], scores: list[dict[str, np.ndarray]], sums: dict[str, jax.Array] | None) -> None:
    sums = dict(sums or {})
    if "mask" in sums:  # of those of several seeds, the same for each
        mask, labels, probabilities = (np.asarray(sums.pop(name)) for name in ("mask", "labels", "probabilities"))
        for step in range(len(mask)):
            real = mask[step].reshape(-1, mask.shape[-1])[0]
            scores.append({"labels": labels[step][..., real], "probabilities": probabilities[step][..., real, :]})
    for name, value in sums.items():
        exact = np.asarray(value, np.float64 if np.issubdtype(value.dtype, np.floating) else np.int64)
        total[name] = total.get(name, 0) + exact.sum(0)


def open_evals(programs: Programs, base: dict[str, sources.Source]) -> dict[str, stream.Images]:
    """The evaluation sets of `data.eval`, by name; an entry is a split of the source, or a source spec and a split.

    `{"test": "test", "other": "folder('x')/train"}`: the part after the last `/` is the split.
    """
    out = {}
    config = programs.recipe.config
    for name, text in config.data.eval.items():
        spec, slash, split = text.rpartition("/") if ")" in text else ("", "", text)
        own = sources.open_splits(spec, config.data.data_dir, config.data.manual_dir) if slash else base
        source = sources.take_split(own, split)
        if tuple(source.class_names) != programs.recipe.data.class_names:
            raise UserError(f"data.eval.{name}={text!r} has the classes {list(source.class_names)[:5]}…, "
                            f"the model {list(programs.recipe.data.class_names)[:5]}…")  # fmt: skip
        out[name] = programs.eval_images(source)
        if out[name].shape != programs.recipe.data.image_shape:
            raise UserError(f"data.eval.{name}: preprocess_eval={programs.recipe.preprocess_eval!r} gives images of "
                            f"{out[name].shape}, training ones are {programs.recipe.data.image_shape}; add "
                            "resize(height, width), or resize_small and central_crop, to both")  # fmt: skip
    return out


def restore(config: ConfigDict, workdir: Workdir, which: str) -> tuple[Programs, Any, int]:
    """(programs, train state, step) of a trained run; `which` is "best", "latest", a step, or "" for best or latest.

    Raises UserError where there is no such checkpoint.
    """
    programs = Programs(Recipe(config, load_data_info(workdir.provenance)))
    if not workdir.checkpoints.is_dir():
        raise UserError(f"{workdir.path} holds no checkpoint yet; train first")
    checkpoints = Checkpoints(workdir.checkpoints, config.checkpoint.keep, config.checkpoint.best, read_only=True)
    steps = checkpoints.steps()
    best = checkpoints.best_step()
    names = {"latest": steps[-1] if steps else None, "best": best, "": best}
    step = names.get(which, int(which) if which.isdigit() else None)
    if which == "" and step is None:
        found = checkpoints.restore_latest(programs.shape)
        if found is None:
            raise UserError(f"{workdir.path} holds no checkpoint yet; train first")
        step, run = found
    elif step not in steps:
        raise UserError(f"--checkpoint={which}: there are {steps} in {workdir.checkpoints}"
                        + ("" if best is None else f", {best} is the best by {config.checkpoint.best}")
                        + ("" if config.checkpoint.best else "; 'best' needs checkpoint.best to be set"))  # fmt: skip
    else:
        run = checkpoints.restore(step, programs.shape)
    log.info("checkpoint of step %d from %s", step, workdir.checkpoints)
    return programs, run["state"], step


def convert(config: ConfigDict, base: dict[str, sources.Source]) -> tuple[Programs, Any]:
    """(programs, train state at step 0) of the weights that `init_from` names, for the classes of the source `base`.

    Raises UserError where they are no whole model.
    """
    source = next(iter(base.values()))  # every split has the same classes and the same shape
    with contextlib.suppress(UserError):
        source = sources.take_split(base, config.data.train)
    images = stream.Images(source, config.preprocess_eval or config.preprocess, config.seed, config.data.threads)
    programs = of_images(config, images)
    weights = pretrained.load(programs, whole=True)
    return programs, programs.init(weights=weights.taken)["state"]


def main(config: ConfigDict, workdir: Workdir | None, which: str, format: str) -> int:
    """The command `evaluate`: prints the metrics of each evaluation set, and the accuracy of each class.

    Of the run in `workdir` or, with None, of the weights that `init_from` names.
    """
    restored = restore(config, workdir, which) if workdir else None
    base = sources.open_splits(config.data.source, config.data.data_dir, config.data.manual_dir)
    programs, state, step = restored or (*convert(config, base), 0)
    if workdir:
        _warn_of_changed_data(programs, workdir.load_config(), base)
    results: dict[str, Any] = {"step": step}
    confusions = {}
    for name, images in open_evals(programs, base).items():
        sums = evaluate(programs, state, images)
        results[name] = metrics.summarize(sums, programs.recipe.whole_set_metrics)
        confusions[name] = sums["confusion"] if programs.recipe.num_seeds == 1 else sums["confusion"][-1]
    if format == "json":
        for name, confusion in confusions.items():
            results[name]["confusion"] = confusion.tolist()
        print(json.dumps(results, indent=2))
        return 0
    for name, confusion in confusions.items():
        print(f"{name}: {format_metrics(results[name])}")
        _print_classes(programs.recipe.data.class_names, confusion)
    return 0


def _warn_of_changed_data(programs: Programs, trained: ConfigDict, base: dict[str, sources.Source]) -> None:
    """Warns where the source holds other examples by now: a slice of it may hold some that were trained on."""
    if programs.recipe.config.data.source != trained.data.source:
        return
    with contextlib.suppress(UserError):  # the training split may be gone: the evaluation sets are what is asked for
        if sources.take_split(base, trained.data.train).fingerprint() != programs.recipe.data.fingerprint:
            log.warning("the data have changed since training: examples trained on may now be in an evaluation set")


def _print_classes(class_names: tuple[str, ...], confusion: np.ndarray) -> None:
    """A table of each class: how many, how many of them right (recall), how many of those called it are (precision)."""
    from rich.table import Table

    table = Table("class", "examples", "recall", "precision", "most often taken for")
    for i, name in enumerate(class_names):
        right, row, column = confusion[i, i], confusion[i].sum(), confusion[:, i].sum()
        wrong = confusion[i] * (np.arange(len(class_names)) != i)
        mistaken = f"{class_names[int(wrong.argmax())]} ({wrong.max()})" if wrong.any() else ""
        table.add_row(
            name, str(row), f"{right / row:.4f}" if row else "", f"{right / column:.4f}" if column else "", mistaken
        )
    print_table(table)
