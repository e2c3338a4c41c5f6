"""The command `features`: writes a trained model's features for images, with names and labels."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import datasets
from imgclf_jax.core import terminal
from imgclf_jax.core.errors import UsageError, UserError
from imgclf_jax.data.source import Source
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.evaluate import outputs
from imgclf_jax.tools.evaluate.changes import compare_with_record
from imgclf_jax.tools.pages import inputs
from imgclf_jax.tools.probe import embeddings
from imgclf_jax.tools.probe.embeddings import Part
from imgclf_jax.train.evaluation import open_evals, open_set
from imgclf_jax.trained import Trained, load_converted, restore

_ROWS = 1024  # images per write


def main(
    config: ConfigDict, workdir: Workdir | None, paths: list[str], checkpoint: str, output: str, split: str
) -> int:
    """Writes the features of images, the input of the head, to a file; returns 1 if an image fails, else 0.

    - `workdir` is the run to use; None uses the weights that `init_from` names, with or without a head.
    - `paths` are the images, or `split` is a split of the data; with neither, the evaluation sets are used.
    - `output` is the file; see `embeddings.write` for its format.
    """
    if paths and split:
        raise UsageError(f"features: name images either by --split={split} or as {paths[0]!r}; drop one")
    file = Path(output)
    if file.suffix != ".npz" or not file.parent.is_dir():
        raise UsageError(f"features: --output={output}: name an .npz file to write, in a directory that exists")
    images = inputs.find(paths) if paths else []
    restored = restore(config, workdir, checkpoint) if workdir else None
    base = {} if restored and paths else datasets.open_data(config)
    model = restored or load_converted(config, base, whole=False)
    results = inputs.Results(images, model.stream("features", images), "computing features")
    parts = _of_files(model, results, paths) if paths else _of_sets(model, workdir, base, split)
    print(f"{file}: features of {embeddings.write(file, list(parts), model.class_names)} images")
    return int(results.failed > 0)


def _of_sets(model: Trained, workdir: Workdir | None, base: dict[str, Source], split: str) -> Iterator[Part]:
    sets = {split: open_set(model.programs, base, split, "--split")} if split else open_evals(model.programs, base)
    if workdir:
        compare_with_record(model.programs, workdir, base, {} if split else sets)
    for name, images in sets.items():
        done, batches = 0, -(-len(images) // model.programs.eval_batch_size)
        for features, labels in terminal.track(outputs.compute_batches(model, images), batches, name):
            ids = range(done, done + len(labels))
            yield Part(name, [images.source.listed_name(i) for i in ids], labels, features)
            done += len(labels)


def _of_files(model: Trained, results: inputs.Results, words: list[str]) -> Iterator[Part]:
    succeeded = ((image, np.atleast_2d(row)) for image, row in results if not isinstance(row, UserError))  # [seeds, d]
    folders = [os.path.join(word, "") for word in words if os.path.isdir(word)]
    for batch in itertools.batched(succeeded, _ROWS):
        if targets := model.programs.recipe.data.target_names:  # folder names cannot tell targets
            labels = np.full((len(batch), len(targets)), np.nan, np.float32)
        else:
            labels = np.array([label_of(image, folders, model.class_names) for image, _ in batch], np.int32)
        yield Part("", [image for image, _ in batch], labels, np.stack([row for _, row in batch], 1))


def label_of(image: str, folders: list[str], class_names: tuple[str, ...]) -> int:
    """Returns the class named by the image's subfolder of one of `folders`, such as "photos/", or -1."""
    for folder in folders:
        if image.startswith(folder):
            name = image.removeprefix(folder).split(os.sep)[0]
            if name in class_names:
                return class_names.index(name)
    return -1
