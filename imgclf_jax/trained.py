"""A trained model as a library: loads a run or converted weights, and maps images to predictions or features."""

import contextlib
import dataclasses
import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from imgclf_jax import datasets, losses
from imgclf_jax.augment import ops
from imgclf_jax.core import dtypes, json_files, machine, processes, sharding, tree
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.core.typing import JsonObject, Variables
from imgclf_jax.data import decode
from imgclf_jax.data.read_ahead import map_ahead, run_ahead
from imgclf_jax.data.source import Source
from imgclf_jax.losses import Task
from imgclf_jax.methods import Problem
from imgclf_jax.programs import Programs, programs_for_images
from imgclf_jax.recipe import Recipe, check_names
from imgclf_jax.run import digests, provenance
from imgclf_jax.run.checkpoint import Checkpoints
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.step import Outputs, TrainState, apply_backbone
from imgclf_jax.weights import pretrained

log = logging.getLogger(__name__)

# A file, its bytes, uint8[h, w, c] or [h, w], or Pillow's image.
type ImageLike = str | os.PathLike[str] | bytes | np.ndarray | Image.Image
type Prepared = tuple[str, np.ndarray | UserError]  # an image's name in messages, and uint8[h, w, c]

_BATCH = 128
_AHEAD = 4  # batches that are decoded before the device has asked for them
_TASK = 16  # images that a thread decodes at a time
NOT_FINITE = "the model gives NaN or infinite values for this image; its weights may hold NaN: try another checkpoint"


class Trained(NamedTuple):
    """A trained model: its programs, its train state, and the step of its checkpoint.

    Images may have any size: the preprocessing that the run recorded brings them to the model's. Methods raise
    UserError, naming the image, if one does not decode.
    """

    programs: Programs
    state: TrainState
    step: int

    def __repr__(self) -> str:
        shape, size = self.programs.recipe.data.image_shape, sum(x.size for x in jax.tree.leaves(self.state.params))
        return (f"Trained({self.config.model} at step {self.step}: images {list(shape)} → {len(self.class_names)} "
                f"classes, {size:,} parameters)")  # fmt: skip

    @property
    def config(self) -> ConfigDict:
        """The config of its training."""
        return self.programs.recipe.config

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the probabilities."""
        return self.programs.recipe.data.class_names

    @property
    def task(self) -> Task:
        """What it predicts: one class or several."""
        return self.programs.recipe.task

    def prepare(self, image: ImageLike, place: int = 0) -> np.ndarray:
        """Preprocesses one image to uint8[h, w, c]. `place` is its index, which a user's own op may read.

        Raises UserError, without the image's name, if it does not decode or ends with another shape.
        """
        if isinstance(image, str | os.PathLike):
            try:
                image = decode.read_file(Path(image))
            except (OSError, ValueError) as e:  # ValueError for a name with a NUL
                raise UserError(reason(e)) from e
        elif isinstance(image, np.ndarray) and image.ndim == 2:
            image = image[..., None]
        wanted = self.programs.recipe.data.image_shape
        out = self.programs.host_ops(image, self.config.seed, place)
        if out.shape != wanted:
            raise UserError(f"preprocess gives {out.shape}, not {wanted}")
        return out

    def predict(self, images: Iterable[ImageLike] | ImageLike) -> np.ndarray:
        """The probabilities f32[n, classes] of n images, calibrated as the run is; of several seeds the ensemble's."""
        return self._all("predict", images, 0)

    def describe(self, outputs: np.ndarray, top_k: int = 3, threshold: float | np.ndarray = 0.5) -> JsonObject:
        """One image's outputs as JSON: f32[classes] of "predict", or f32[2, classes] of "ranked".

        {"predictions": [{"class", "probability"}]}, in descending order: the `top_k` classes, or for multi-label runs
        every class with at least the `threshold`, one number or one per class. Ties go by index.
        """
        probabilities, ranking = outputs if outputs.ndim == 2 else (outputs, outputs)
        order = np.argsort(-ranking, kind="stable")
        if self.task is Task.MULTILABEL:
            chosen = order[(probabilities >= np.asarray(threshold, probabilities.dtype))[order]]
        else:
            chosen = order[:top_k]
        return {"predictions": [{"class": self.class_names[c], "probability": float(f"{probabilities[c]:.7g}")}
                                for c in chosen]}  # fmt: skip

    def logits(self, images: Iterable[ImageLike] | ImageLike) -> np.ndarray:
        """The network's own logits f32[n, classes]; with several seeds [seeds, n, classes]."""
        return self._all("logits", images, -2)

    def features(self, images: Iterable[ImageLike] | ImageLike) -> np.ndarray:
        """The features that the head gets, f32[n, d]; with several seeds [seeds, n, d]."""
        return self._all("features", images, -2)

    def _all(self, what: Outputs, images: Iterable[ImageLike] | ImageLike, axis: int) -> np.ndarray:
        if isinstance(images, str | os.PathLike | bytes | Image.Image) or getattr(images, "ndim", 0) in (2, 3):
            images = [images]  # type: ignore[list-item]
        rows = []
        for row in self.stream(what, images):
            if isinstance(row, UserError):
                raise row
            rows.append(row)
        if not rows:
            raise UserError(f"{what} got no images; pass one or more")
        return np.stack(rows, axis)

    def stream(self, what: Outputs, images: Iterable[ImageLike]) -> Iterator[np.ndarray | UserError]:
        """Yields the output for each image in order, or a UserError for an image that cannot be used.

        Threads decode ahead of the device and hold only a few batches, so `images` may be endless.
        """
        _ = self.programs.host_ops  # an error in these concerns no single image
        program, mesh, shape = self.programs.inference(what), self.programs.mesh, self.programs.recipe.data.image_shape
        size = sharding.round_up(min(self.config.batch_size, _BATCH), mesh)
        threads, tasks = machine.processors(), itertools.batched(enumerate(images), _TASK)
        decoded = map_ahead(self._prepare_some, tasks, threads, _AHEAD * size // _TASK)

        def computing() -> Iterator[tuple[tuple[Prepared, ...], jax.Array]]:
            for prepared in itertools.batched(itertools.chain.from_iterable(decoded), size):
                batch = np.zeros((size, *shape), np.uint8)  # one shape, so one compilation
                for row, (_, pixels) in enumerate(prepared):
                    if not isinstance(pixels, UserError):
                        batch[row] = pixels
                yield prepared, program(*self.state.evaluated, sharding.put_batch(batch, mesh))

        for prepared, out in run_ahead(computing(), 1):
            values = np.asarray(jax.device_get(out))  # while the device computes the next batch
            for row, (name, pixels) in enumerate(prepared):
                if isinstance(pixels, UserError):
                    yield pixels
                elif is_finite(values[..., row, :], what):
                    yield values[..., row, :]
                else:
                    yield UserError(f"{name}: {NOT_FINITE}")

    def _prepare_some(self, images: Iterable[tuple[int, ImageLike]]) -> list[Prepared]:
        out: list[Prepared] = []
        for place, image in images:
            name = str(image) if isinstance(image, str | os.PathLike) else f"image {place}"
            try:
                out.append((name, self.prepare(image, place)))
            except UserError as e:
                out.append((name, UserError(f"{name}: {e}")))
        return out


def is_finite(outputs: np.ndarray, what: Outputs) -> bool:
    """Whether one image's outputs can be used: none is NaN, and only logits, which may rule out classes, infinite."""
    values = outputs[0] if what == "ranked" else outputs
    return not np.isnan(values).any() if what == "logits" else bool(np.isfinite(values).all())


def load(workdir: str | os.PathLike[str], checkpoint: str = "", trust: bool = False) -> Trained:
    """The trained model of the run in a work directory.

    `checkpoint` is "best", "latest" or a step: see `restore`. Unless `trust` is set, nothing that the run names is
    imported or fetched. Raises UserError without such a run or checkpoint, and without `trust` if it names code.
    """
    place = Workdir(os.fspath(workdir))
    with contextlib.nullcontext() if trust else place.untrusted():
        config = place.load_config()
        check_names(config)
        # `restore` imports what the config names while imports are guarded.
        return _calibrate(restore(config, place, checkpoint), place)


def load_teacher(problem: Problem, run: str, checkpoint: str = "", trust: bool = False) -> dict[str, Any]:
    """The attributes of a `methods.Teacher`: the variables of a run, and pure functions of them.

    Raises UserError as `load` does, and if the run's images differ from the problem's.
    """
    found = load(run, checkpoint, trust)
    recipe = found.programs.recipe
    if recipe.config.num_seeds > 1:
        raise UserError(f"{run} holds num_seeds={recipe.config.num_seeds} models; a teacher is a run of one seed")
    normalization = ops.evaluation_spec(recipe.config.augment)
    for key, theirs, ours in (("preprocess", recipe.data.image_shape, problem.image_shape),
                              ("augment", normalization, problem.normalization)):  # fmt: skip
        if theirs != ours:
            raise UserError(f"{run} was trained on images with {theirs or 'no normalization'}, and this run has "
                            f"{ours or 'none'}: its predictions would be wrong; give both the same {key}")  # fmt: skip
    params, model_state = found.state.evaluated

    def apply(variables: Variables, images: jax.Array) -> jax.Array:
        found.programs.check_predicts()
        return dtypes.upcast(recipe.model.apply(variables, images, train=False))

    def features(variables: Variables, images: jax.Array) -> jax.Array:
        return dtypes.upcast(apply_backbone(recipe.model, variables, images))

    return {"variables": {"params": params, **model_state}, "apply": apply, "features": features,
            "link": losses.link_of(recipe.config.loss), "class_names": recipe.data.class_names,
            "classes": len(recipe.data.class_names)}  # fmt: skip


def load_trained(config: ConfigDict, workdir: Workdir | None, which: str, temperature: float | None = None) -> Trained:
    """The trained model of a run or, without a work directory, of the weights that `init_from` names.

    Its probabilities are calibrated as the run is, or else by this `temperature`.
    """
    return _calibrate(restore(config, workdir, which) if workdir else load_converted(config), workdir, temperature)


def restore(config: ConfigDict, workdir: Workdir, which: str) -> Trained:
    """The trained model of a run. `which` is "best", "latest", a step, or "" for the best one if any, else the latest.

    Raises UserError if there is no such checkpoint.
    """
    recipe = Recipe(config, workdir.load_data_info(), load_teacher)
    programs = Programs(recipe, sharding.make_inference_mesh(config.mesh))
    metric = config.checkpoint.best
    checkpoints = Checkpoints(workdir.checkpoints, config.checkpoint.keep, metric, read_only=True)
    steps, best = processes.broadcast(lambda: (checkpoints.steps(), checkpoints.best_step()))
    wanted = {"state": programs.state_shape}
    names = {"latest": steps[-1] if steps else None, "best": best, "": best}
    step = names.get(which, int(which) if which.isdecimal() else None)
    if step is None and which == "":
        if not (found := checkpoints.restore_latest(wanted, optimizer=False)):
            raise UserError(f"{workdir.path} holds no checkpoint yet; train first")
        step, run = found
    elif step in steps:
        run = checkpoints.restore(step, wanted, optimizer=False)
    else:
        raise UserError(f"--checkpoint={which}: there are {steps} in {workdir.checkpoints}, and "
                        + (f"the best by {metric} is {best}" if metric else "checkpoint.best is not set"))  # fmt: skip
    digests.check(workdir, step, run["state"].params)
    log.info("checkpoint of step %d from %s", step, workdir.checkpoints)
    ended = processes.broadcast(workdir.last_step)
    if step < ended and (which == "latest" or (not which and best is None)):
        log.warning("the run in %s ended at step %d, but its latest checkpoint is of step %d: its outputs are not "
                    "those of the result", workdir.path, ended, step)  # fmt: skip
    processes.agree(provenance.process_facts)  # restoring may have imported more
    _ = programs.host_ops, recipe.views, recipe.whole_set_metrics  # import what they name
    workdir.warn_of_changed_modules()
    return Trained(programs, run["state"], step)


def _calibrate(model: Trained, workdir: Workdir | None, temperature: float | None = None) -> Trained:
    """The model with the calibration of a `temperature`, else of calibration.json, which `evaluate --calibrate` writes.

    Warns of a file for another model, and leaves it out. Raises UserError for a damaged one.
    """
    if temperature is not None:
        if model.task is Task.MULTILABEL:
            raise UserError("--temperature scales one class against the others, but this model predicts several labels")
        numbers = {"scale": np.array([1 / temperature]), "bias": np.zeros(1)}
        return model._replace(programs=dataclasses.replace(model.programs, calibration=numbers))
    if not workdir or not (file := workdir.calibration).is_file():
        return model
    of = json_files.as_object((found := json_files.read(file)).get("of"))
    if other := [key for key, value in calibrated_facts(model).items() if of.get(key) != value]:
        log.warning("ignoring %s, which is of another %s: run evaluate --calibrate again", file, " and ".join(other))
        return model
    try:
        numbers = {name: np.array(x, np.float64).reshape(-1) for name, x in found["numbers"].items() if x}
        np.broadcast_shapes(numbers["scale"].shape, numbers["bias"].shape, (len(model.class_names),))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{file} is damaged: remove it, and run evaluate --calibrate again") from e
    log.info("%s calibrates the probabilities", file)
    return model._replace(programs=dataclasses.replace(model.programs, calibration=numbers))


def calibrated_facts(model: Trained) -> JsonObject:
    """What a calibration holds for: the evaluated variables, and the keys on which their logits depend."""
    config = {"tta": model.config.tta, "loss": model.config.loss, "preprocess": model.programs.preprocess_eval}
    config["augment"] = ops.evaluation_spec(model.config.augment)
    return {"version": 1, "variables_sha256": tree.sha256(model.state.evaluated), **config}


def load_converted(config: ConfigDict, base: dict[str, Source] | None = None, whole: bool = True) -> Trained:
    """The model with the weights that `init_from` names, at step 0, for the classes of the source `base`.

    `base` defaults to the config's source. Unless `whole`, the weights may lack the head, which then is random. Raises
    UserError if they lack any other part of the model.
    """
    source = next(iter((base or datasets.open_data(config)).values()))  # all splits have the same classes and shape
    images, mesh = datasets.eval_images(source, config), sharding.make_inference_mesh(config.mesh)
    programs = programs_for_images(config, images, mesh)
    return Trained(programs, programs.init_state(weights=pretrained.load(programs, whole).taken), 0)
