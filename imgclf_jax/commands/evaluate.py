"""Exact evaluation: every example counts once, on any number of devices and for any batch size."""

import contextlib
import itertools
import json
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import metrics
from imgclf_jax.commands.trained import convert, report_host_ops, restore
from imgclf_jax.core import processes, sharding, signals
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources, stream
from imgclf_jax.programs import Programs
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import format_metrics, print_table

log = logging.getLogger(__name__)


def evaluate(
    programs: Programs, state: Any, images: stream.Images, stop: Callable[[], str] = str
) -> tuple[metrics.Sums, metrics.Predictions | None]:
    """(sums, predictions) over all of `images`, on the host: integers exact, the loss in float64.

    The predictions are None unless the config's `metrics` need them. With several seeds, the sums are [seeds + 1, …].
    Raises signals.Stopped once `stop` gives the name of a signal.
    """
    size = programs.steps_per_call
    sums: metrics.Sums = {}
    predictions: list[metrics.Predictions] = []  # one a batch

    def collect(result: tuple[metrics.Sums, metrics.Predictions | None]) -> None:
        new, steps = jax.device_get(result)
        for name, value in new.items():
            exact = np.float64 if np.issubdtype(value.dtype, np.floating) else np.int64
            sums[name] = sums.get(name, 0) + value.sum(0, dtype=exact)
        if steps is not None:
            predictions.extend(metrics.Predictions(*step) for step in zip(*steps, strict=True))

    pending: Any = None
    rows = sharding.rows_here(programs.eval_batch_size, programs.mesh)
    batches = stream.eval_batches(images, programs.eval_batch_size, rows)
    for some in itertools.batched(batches, size):
        signals.check(stop)
        chunk = {name: stream.pad_steps(np.stack([batch[name] for batch in some]), size) for name in some[0]}
        chunk = sharding.put_batch(chunk, programs.mesh, axis=1)
        result = programs.eval(*state.evaluated, chunk, np.int32(len(some)))
        if pending is not None:
            collect(pending)  # while the device computes the next chunk
        pending = result
    collect(pending)
    if wrong := int(np.max(sums["examples"] - sums["class_predicted"].sum(-1))):
        log.warning("the logits of %d examples are NaN or infinite; these examples count as wrong", wrong)
    return sums, metrics.concatenate(predictions) if predictions else None


def evaluate_all(
    programs: Programs, state: Any, evals: dict[str, stream.Images], stop: Callable[[], str] = str
) -> dict[str, dict[str, float]]:
    """The metrics of each evaluation set, by its name. Raises signals.Stopped as `evaluate` does."""
    return {
        name: metrics.summarize(*evaluate(programs, state, images, stop), programs.recipe.whole_set_metrics)
        for name, images in evals.items()
    }


def open_evals(programs: Programs, base: dict[str, sources.Source]) -> dict[str, stream.Images]:
    """The evaluation sets of `data.eval`, by name: each is a split of the source, or a source spec, "/" and a split.

    An example is `{"test": "test", "other": "folder('x')/train"}`. Raises UserError for a set with other classes or
    other image shapes than the training set, and for host ops that draw at random.
    """
    out = {}
    config = programs.recipe.config
    report_host_ops(programs)
    for name, text in config.data.eval.items():
        spec, slash, split = text.rpartition("/") if ")" in text else ("", "", text)
        own = sources.open_data(config, spec) if slash else base
        source = sources.take_split(own, split)
        if tuple(source.class_names) != programs.recipe.data.class_names:
            raise UserError(f"data.eval.{name}={text!r} has the classes {list(source.class_names)[:5]}…, "
                            f"the model {list(programs.recipe.data.class_names)[:5]}…")  # fmt: skip
        out[name] = programs.eval_images(source)
        if out[name].shape != programs.recipe.data.image_shape:
            raise UserError(f"data.eval.{name}: preprocess_eval={programs.preprocess_eval!r} gives images of "
                            f"{out[name].shape}, training ones are {programs.recipe.data.image_shape}; add "
                            "resize(height, width), or resize_small and central_crop, to both")  # fmt: skip
    return out


def main(config: ConfigDict, workdir: Workdir | None, which: str, format: str) -> int:
    """The command `evaluate`: prints the metrics of each evaluation set, and a table of its classes.

    It evaluates the run in `workdir`. If that is None, it evaluates the weights that `init_from` names. The format
    "json" prints one object: the `step`, and for each set its metrics, its `class_names` and, in their order, its
    `confusion`, [label][prediction]. Above CONFUSION_CLASSES classes there is no `confusion`, but `class_examples`,
    `class_predicted` and `class_correct`.
    """
    restored = restore(config, workdir, which) if workdir else None
    base = sources.open_data(config)
    programs, state, step = restored or (*convert(config, base), 0)
    if workdir:
        _warn_of_changed_data(programs, workdir.load_config(), base)
    results: dict[str, Any] = {"step": step}
    classes = {}
    for name, images in open_evals(programs, base).items():
        sums, predictions = evaluate(programs, state, images)
        results[name] = metrics.summarize(sums, predictions, programs.recipe.whole_set_metrics)
        classes[name] = _class_counts(sums, programs.recipe.num_seeds)
    if processes.index():
        return 0
    if format == "json":
        for name, counts in classes.items():
            shown = ("confusion",) if "confusion" in counts else tuple(counts)
            results[name] |= {"class_names": list(programs.recipe.data.class_names)}
            results[name] |= {key: counts[key].tolist() for key in shown}
        print(json.dumps(results, indent=2))
        return 0
    for name, counts in classes.items():
        print(f"{name}: {format_metrics(results[name])}")
        _print_classes(programs.recipe.data.class_names, counts)
    return 0


def _warn_of_changed_data(programs: Programs, trained: ConfigDict, base: dict[str, sources.Source]) -> None:
    """Warns if the source holds other examples than in training: a split of it may hold some that were trained on."""
    if programs.recipe.config.data.source != trained.data.source:
        return
    with contextlib.suppress(UserError):  # the training split may be gone, and only the evaluation sets are needed
        if sources.take_split(base, trained.data.train).fingerprint() != programs.recipe.data.fingerprint:
            log.warning("the data have changed since training: examples trained on may now be in an evaluation set")


def _class_counts(sums: metrics.Sums, num_seeds: int) -> dict[str, np.ndarray]:
    """The counts of each class, and the confusion matrix if there is one; with several seeds those of the ensemble."""
    counts = {name: value for name, value in sums.items() if name.startswith("class_") or name == "confusion"}
    return counts if num_seeds == 1 else {name: value[-1] for name, value in counts.items()}


def _print_classes(class_names: tuple[str, ...], counts: dict[str, np.ndarray]) -> None:
    """A table with a row for each class.

    Recall is the share of the class's examples that are predicted right, precision the share of the predictions of the
    class that are right.
    """
    confusion = counts.get("confusion")
    columns = ["class", "examples", "recall", "precision", *([] if confusion is None else ["most often taken for"])]
    rows = []
    for i, name in enumerate(class_names):
        examples, predicted, right = (counts[f"class_{key}"][i] for key in ("examples", "predicted", "correct"))
        row = [name, str(examples), f"{right / examples:.4f}" if examples else ""]
        row.append(f"{right / predicted:.4f}" if predicted else "")
        if confusion is not None:
            wrong = confusion[i] * (np.arange(len(class_names)) != i)
            row.append(f"{class_names[int(wrong.argmax())]} ({wrong.max()})" if wrong.any() else "")
        rows.append(row)
    print_table(columns, rows)
    if confusion is None:
        print(f"The column 'most often taken for' is left out: it needs the confusion matrix, which is counted for up "
              f"to {metrics.CONFUSION_CLASSES} classes only, and these are {len(class_names)}.")  # fmt: skip
