"""The command `features`: writes a trained model's features for images, with names and labels."""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import datasets
from imgclf_jax.core import paths, terminal
from imgclf_jax.core.errors import UsageError, UserError
from imgclf_jax.core.text import escape_surrogates
from imgclf_jax.data.source import Source
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.evaluate import outputs
from imgclf_jax.tools.evaluate.changes import compare_with_record
from imgclf_jax.tools.pages import inputs
from imgclf_jax.train.evaluation import open_evals, open_set
from imgclf_jax.trained import Trained, load_converted, restore

_ROWS = 1024  # images of files in a part


class Part(NamedTuple):
    """A batch of images: labels i32[b] (-1 is unknown) or targets f32[b, k] (NaN is), features f32[seeds, b, d]."""

    set: str
    names: list[str]
    labels: np.ndarray
    features: np.ndarray


def main(
    config: ConfigDict, workdir: Workdir | None, files: list[str], checkpoint: str, output: str, split: str
) -> int:
    """Writes the features of images, the input of the head, to a file; returns 1 if an image fails, else 0.

    - `workdir` is the run to use; None uses the weights that `init_from` names, with or without a head.
    - `files` are the images, or `split` is a split of the data; with neither, the evaluation sets are used.
    - `output` is the file; see `write` for its format.
    """
    if files and split:
        raise UsageError(f"features: name images either by --split={split} or as {files[0]!r}; drop one")
    file = Path(output)
    if file.suffix != ".npz" or not file.parent.is_dir():
        raise UsageError(f"features: --output={output}: name an .npz file to write, in a directory that exists")
    images = inputs.find(files) if files else []
    restored = restore(config, workdir, checkpoint) if workdir else None
    base = {} if restored and files else datasets.open_data(config)
    model = restored or load_converted(config, base, whole=False)
    results = inputs.Results(images, model.stream("features", images), "computing features")
    parts = _of_files(model, results, files) if files else _of_sets(model, workdir, base, split)
    print(f"{file}: features of {write(file, list(parts), model.class_names)} images")
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


def write(path: Path, parts: Sequence[Part], class_names: Sequence[str]) -> int:
    """Writes an .npz file atomically; returns the number of images. Raises UserError if there are none.

    It has `features` f32[n, d] ([seeds, n, d] for several seeds), `names`, `sets`, and either `labels` i32[n] and
    `class_names`, or `targets` f32[n, k] and `target_names`.
    """
    if not parts:
        raise UserError(f"cannot write {path}: no image has features")
    features, labels = np.concatenate([part.features for part in parts], 1), np.concatenate([p.labels for p in parts])
    kinds = ("labels", "class_names") if labels.ndim == 1 else ("targets", "target_names")
    names = np.array([escape_surrogates(name) for part in parts for name in part.names])
    shown, sets = np.array(list(map(escape_surrogates, class_names))), np.array([p.set for p in parts for _ in p.names])
    with paths.replacing(path) as file:
        np.savez(file, allow_pickle=False, features=features[0] if len(features) == 1 else features, names=names,
                 sets=sets, **dict(zip(kinds, (labels, shown), strict=True)))  # fmt: skip
    return len(names)


def label_of(image: str, folders: list[str], class_names: tuple[str, ...]) -> int:
    """Returns the class named by the image's subfolder of one of `folders`, such as "photos/", or -1."""
    for folder in folders:
        if image.startswith(folder):
            name = image.removeprefix(folder).split(os.sep)[0]
            if name in class_names:
                return class_names.index(name)
    return -1
