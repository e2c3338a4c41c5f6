"""Writes what a trained model makes of images: a vector each, with names and labels."""

import contextlib
import itertools
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from imgclf_jax.cli import inputs
from imgclf_jax.core import processes
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import printable, utf8
from imgclf_jax.data import sources
from imgclf_jax.run import terminal
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.probe import embeddings, feature_sets
from imgclf_jax.train.evaluation import compare_with_record, open_evals, open_set
from imgclf_jax.trained import Trained, load_converted, report_host_ops, restore

log = logging.getLogger(__name__)

_ROWS = 1024  # images that are written at once


def main(
    config: ConfigDict, workdir: Workdir | None, paths: list[str], checkpoint: str, output: str, split: str
) -> int:
    """The command `features`: writes the features of images to the file `output`; 1 if an image failed, else 0.

    The images are those of `paths`, or those of the `split`, or, if both are empty, the evaluation sets. The features
    are what the head is given, of the run in `workdir` or, if that is None, of the weights that `init_from` names,
    which may be without a head. See `embeddings.writing` for the file.
    """
    if not output:
        raise UserError("features: name the file to write: --output FILE.npz or FILE.parquet")
    if paths and split:
        raise UserError(f"features: --split={split} names images of the run's data, and {paths[0]!r} others; drop one")
    file = Path(output)
    embeddings.check(file)
    images = inputs.find("features", paths) if paths else iter(())
    restored = restore(config, workdir, checkpoint) if workdir else None
    base = {} if restored and paths else sources.open_data(config)
    model = restored or load_converted(config, base, whole=False)
    errors: list[Exception] = []  # what ended the images before their end
    with contextlib.ExitStack() as stack:
        add = (
            _drop
            if processes.index()
            else stack.enter_context(
                embeddings.writing(file, model.class_names, bool(model.programs.recipe.data.target_names))
            )
        )
        if paths:
            report_host_ops(model.programs)
            written, failed = _add_files(model, paths, inputs.until_error(images, errors), add)
            if errors and not written:
                raise errors[0]
        else:
            written, failed = _add_sets(model, workdir, base, split, add), 0
    if processes.index():
        return 1 if failed or errors else 0
    print(f"{file}: features of {written} images")
    if failed:
        print(f"error: {failed} of {written + failed} images are left out", file=sys.stderr)
    if errors:
        raise errors[0]
    return 1 if failed else 0


def _drop(of: str, called: Sequence[str], own: np.ndarray, features: np.ndarray) -> None:
    """Adds nothing: process 0 alone writes the file."""


def _add_sets(
    model: Trained, workdir: Workdir | None, base: dict[str, sources.Source], split: str, add: embeddings.Add
) -> int:
    if split:
        report_host_ops(model.programs)
        sets = {split: open_set(model.programs, base, split, "--split")}
    else:
        sets = open_evals(model.programs, base)
    if workdir:
        compare_with_record(model.programs, workdir, base, {} if split else sets)
    for name, images in sets.items():
        called, done = getattr(images.source, "name", str), 0
        batches = -(-len(images) // model.programs.eval_batch_size)
        for features, labels in terminal.track(feature_sets.features_of_set(model, images), batches, name):
            add(name, [utf8(called(i)) for i in range(done, done + len(labels))], labels, features)
            done += len(labels)
    return sum(map(len, sets.values()))


def _add_files(
    model: Trained, words: list[str], images: Iterator[inputs.Input], add: embeddings.Add
) -> tuple[int, int]:
    """(how many are written, how many failed); each failure is printed."""
    failed = written = 0

    def good() -> Iterator[tuple[inputs.Input, np.ndarray]]:
        nonlocal failed
        for image, result in terminal.count(inputs.compute(model, "features", images), "images"):
            if isinstance(result, UserError):
                failed += 1
                if not processes.index():
                    print(f"error: {printable(str(result))}", file=sys.stderr)
            else:
                yield image, np.atleast_2d(result)  # [seeds, d]

    folders = [os.path.join(word, "") for word in words if os.path.isdir(word)]
    for some in itertools.batched(good(), _ROWS):
        if targets := model.programs.recipe.data.target_names:  # which no folder's name says
            labels = np.full((len(some), len(targets)), np.nan, np.float32)
        else:
            labels = np.array([label_of(image, folders, model.class_names) for image, _ in some], np.int32)
        add("", [utf8(image.path) for image, _ in some], labels, np.stack([row for _, row in some], 1))
        written += len(some)
    return written, failed


def label_of(image: inputs.Input, folders: list[str], class_names: tuple[str, ...]) -> int:
    """The class that the image's folder inside of one of `folders`, "photos/", is called; -1 if there is none such."""
    for folder in folders:
        if image.found and image.path.startswith(folder):
            name = utf8(image.path.removeprefix(folder).split(os.sep)[0])
            if name in class_names:
                return class_names.index(name)
    return -1
