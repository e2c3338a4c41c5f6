"""Exact evaluation: every example counts once, on any number of devices and for any batch size."""

import itertools
import logging
import operator
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax import datasets, losses, metrics
from imgclf_jax.core import processes, sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.stopping import Stopped
from imgclf_jax.core.terminal import track
from imgclf_jax.core.typing import Batch
from imgclf_jax.data import sources, splits, stream
from imgclf_jax.data.read_ahead import run_ahead
from imgclf_jax.data.source import Source
from imgclf_jax.programs import Programs
from imgclf_jax.run.provenance import process_facts
from imgclf_jax.step import TrainState

log = logging.getLogger(__name__)


def evaluate(
    programs: Programs, state: TrainState, images: stream.Images, stop: Callable[[], str] = str, caption: str = ""
) -> tuple[metrics.Sums, metrics.AnyPredictions | None]:
    """Evaluates all of `images`: (sums, predictions) on the host, counts as int64 and losses as float64.

    The predictions are None unless the config's `metrics` need them. With several seeds, the sums are [seeds + 1, …].
    Shows its progress, called `caption`, unless that is "". Raises Stopped once `stop` names a signal.
    """
    sums: metrics.Sums = {}
    predictions: list[metrics.AnyPredictions] = []  # one a batch
    calls = batches(programs, images, stop)
    if caption:
        calls = track(calls, len(images), caption, lambda _: programs.eval_call_size)
    results = (programs.eval(*state.evaluated, batch) for batch in calls)
    for new, predicted in map(jax.device_get, run_ahead(results, 1)):  # while the device computes the next batch
        add(sums, new)
        if predicted is not None:
            predictions += [jax.tree.map(operator.itemgetter(i), predicted) for i in range(len(predicted.mask))]
    if wrong := int(np.max(sums.get("nonfinite", 0))):
        log.warning("the outputs of %d examples are NaN or infinite; they count as wrong", wrong)
    return sums, metrics.concatenate(predictions) if predictions else None


def batches(programs: Programs, images: stream.Images, stop: Callable[[], str] = str) -> Iterator[Batch]:
    """Yields the batches of `images` for `programs.eval`, on the devices. Raises Stopped as `evaluate` does."""
    rows = sharding.rows_here(programs.eval_call_size, programs.mesh)
    for batch in stream.eval_batches(images, programs.eval_call_size, rows):
        if name := stop():
            raise Stopped(name)
        yield sharding.put_batch(batch, programs.mesh)


def add(sums: metrics.Sums, new: metrics.Sums) -> None:
    """Adds the sums of some batches, [batches, …] on the host, to `sums`: integers as int64, the loss as float64."""
    for name, value in new.items():
        exact = np.float64 if jnp.issubdtype(value.dtype, jnp.floating) else np.int64
        sums[name] = sums.get(name, 0) + np.sum(value, 0, exact)


def evaluate_all(
    programs: Programs, state: TrainState, evals: dict[str, stream.Images], stop: Callable[[], str] = str
) -> dict[str, dict[str, float]]:
    """The metrics of each evaluation set by name. Raises Stopped as `evaluate` does."""
    whole_set = programs.recipe.whole_set_metrics
    return {name: metrics.summarize(*evaluate(programs, state, one, stop), whole_set) for name, one in evals.items()}


def open_evals(programs: Programs, base: dict[str, Source]) -> dict[str, stream.Images]:
    """Opens the evaluation sets of `data.eval` by name: splits of the source, or SOURCE/SPLIT.

    For example `{"test": "test", "other": "folder('x')/train"}`. Raises UserError for a set whose classes or image
    shapes differ from the training set's, and for random preprocessing. The labels of a set without class names, as of
    TFDS's cifar10_corrupted, are taken as indices.
    """
    processes.agree(process_facts)  # more are imported by now
    evals = programs.recipe.config.data.eval.items()
    return {name: open_set(programs, base, text, f"data.eval.{name}") for name, text in evals}


def open_set(programs: Programs, base: dict[str, Source], text: str, key: str) -> stream.Images:
    """Opens one evaluation set, `text` as in `data.eval`. Errors name `key`."""
    config = programs.recipe.config
    spec, split = datasets.split_source(text)
    own = datasets.open_data(config, spec) if spec else base
    try:
        splits.check_disjoint(split, {name: source.size for name, source in own.items()})
        source = sources.take_split(own, split)
    except UserError as e:
        raise UserError(f"{key}: {e}") from e
    names = programs.recipe.data.class_names
    if source.class_names == tuple(map(str, range(len(names)))) and not all(map(str.isdigit, names)):
        log.warning("%s=%r has no class names: its labels are taken as indices of the model's classes", key, text)
    elif source.class_names != names:
        here, there = next(pair for pair in itertools.zip_longest(source.class_names, names) if pair[0] != pair[1])
        raise UserError(f"{key}={text!r} has {len(source.class_names)} classes and the model {len(names)}: the first "
                        f"that differs is {here!r} here and {there!r} in the model")  # fmt: skip
    if source.target_names != programs.recipe.data.target_names:
        raise UserError(f"{key}={text!r}: one of this set and the training examples has targets, the other has labels")
    images = datasets.eval_images(source, config, programs.recipe.data.bits)
    if images.shape != programs.recipe.data.image_shape:
        raise UserError(f"{key}: preprocess_eval={programs.preprocess_eval!r} gives images of "
                        f"{images.shape}, training ones are {programs.recipe.data.image_shape}; add "
                        "resize(height, width), or resize_small and central_crop, to both")  # fmt: skip
    check_targets(programs, images)
    return images


def check_targets(programs: Programs, images: stream.Images) -> None:
    """Raises UserError for targets that the run's loss does not take, also in further streams with the same names."""
    recipe = programs.recipe
    for source in (images.source, *(extra.source for extra in images.extra.values())):
        if recipe.task is not losses.Task.CLASSES and source.target_names == images.source.target_names:
            assert source.labels is not None
            losses.check_targets(recipe.config.loss, recipe.task, source.labels, source.example_name)
