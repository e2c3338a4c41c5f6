"""A trained model as a library: images of any kind to probabilities, logits and features."""

import concurrent.futures
import contextlib
import itertools
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from imgclf_jax.core import named_warnings, processes, sharding, tree
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.data import decode
from imgclf_jax.inference import Outputs
from imgclf_jax.losses import Task
from imgclf_jax.programs import Programs

log = logging.getLogger(__name__)

# A file, its bytes, uint8[h, w, c] or [h, w], or Pillow's image.
ImageLike = str | os.PathLike[str] | bytes | np.ndarray | Image.Image

_BATCH = 128
_AHEAD = 4  # batches that are decoded before the device has asked for them
_TASK = 16  # images that a thread decodes at a time


def report_host_ops(programs: Programs) -> None:
    """Logs the host ops of evaluation if they follow from `preprocess` and differ from it."""
    config = programs.recipe.config
    if not config.preprocess_eval and programs.preprocess_eval != config.preprocess:
        log.info("preprocess=%r draws at random, and preprocess_eval is empty: evaluation and prediction use %r",
                 config.preprocess, programs.preprocess_eval)  # fmt: skip


class Trained(NamedTuple):
    """A trained model: its programs, its state, and the step of its checkpoint.

    Images are of any size: the host ops of evaluation, which the run recorded, bring them to the model's. Methods raise
    UserError, naming the image, for one that does not decode.
    """

    programs: Programs
    state: Any
    step: int

    @property
    def config(self) -> ConfigDict:
        """The config that it was trained with."""
        return self.programs.recipe.config

    @property
    def params_sha256(self) -> str:
        """The digest of the parameters, as result.json and digests.jsonl have it. All processes call this."""
        return tree.sha256(self.state.params)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the probabilities."""
        return self.programs.recipe.data.class_names

    @property
    def task(self) -> Task:
        """What it predicts: one class, several labels, or numbers."""
        return self.programs.recipe.task

    def prepare(self, image: ImageLike, place: int = 0) -> np.ndarray:
        """One image to uint8[h, w, c] as the model takes it. `place` is its number, for host ops of one's own.

        Raises UserError, without the image's name, if it does not decode or has another shape afterwards.
        """
        if isinstance(image, str | os.PathLike):
            try:
                image = decode.read_file(Path(image))
            except OSError as e:
                raise UserError(e.strerror or str(e)) from e
            except ValueError as e:  # of a name with a NUL
                raise UserError(str(e)) from e
        elif isinstance(image, np.ndarray) and image.ndim == 2:
            image = image[..., None]
        wanted = self.programs.recipe.data.image_shape
        try:
            out = self.programs.host_ops(image, self.config.seed, place)
        except UserError:
            raise
        except Exception as e:  # of the user's own ops, or of Pillow
            raise UserError(
                f"preprocess={self.programs.preprocess_eval!r} fails: {type(e).__name__}: {reason(e)}"
            ) from e
        if out.shape != wanted:
            raise UserError(f"preprocess gives {out.shape}, not {wanted}")
        return out

    def predict(self, images: Iterable[ImageLike] | ImageLike) -> np.ndarray:
        """The probabilities f32[n, classes] of n images, or a regression's values f32[n, targets].

        Those of several seeds are of their ensemble.
        """
        return self._all("predict", images, 0)

    def best(self, probabilities: np.ndarray, top_k: int) -> list[dict[str, Any]]:
        """The `top_k` classes of one image, from its probabilities f32[classes]: [{"class", "probability"}].

        The likeliest comes first; of equal ones the first class.
        """
        order = np.argsort(-probabilities, kind="stable")[:top_k]
        return [{"class": self.class_names[c], "probability": round(float(probabilities[c]), 6)} for c in order]

    def describe(self, outputs: np.ndarray, top_k: int = 3, threshold: float | np.ndarray = 0.5) -> dict[str, Any]:
        """What one image's outputs f32[k] say, by the task.

        {"predictions": [{"class", "probability"}]}, the likeliest first: the `top_k` classes, or, of several labels,
        all whose probability is at least the `threshold`, one number or one for each class. {"values": {target:
        number}} of a regression.
        """
        if self.task is Task.REGRESSION:  # float32 has seven digits
            return {"values": {name: float(f"{x:.7g}") for name, x in zip(self.class_names, outputs, strict=True)}}
        if self.task is not Task.MULTILABEL:
            return {"predictions": self.best(outputs, top_k)}
        above = outputs >= np.asarray(threshold, outputs.dtype)
        ranked = np.where(above, outputs, -np.inf)
        return {"predictions": self.best(ranked, int(above.sum()))}

    def thresholds(self, text: str) -> np.ndarray:
        """f64[] or f64[classes] from "0.5" or a number for each class between commas; "" is 0.5.

        Raises UserError for what is neither, and for a model that has no use for it.
        """
        if text and self.task is not Task.MULTILABEL:
            raise UserError(f"--threshold={text}: it is for several labels, and this model predicts "
                            f"{'numbers' if self.task is Task.REGRESSION else 'one class'}; drop it")  # fmt: skip
        try:
            found = np.array([float(part) for part in (text or "0.5").split(",")])
        except ValueError:
            found = np.array([np.nan])
        if len(found) not in (1, len(self.class_names)) or not ((found >= 0) & (found <= 1)).all():
            raise UserError(f"--threshold={text}: wants a number from 0 to 1, or {len(self.class_names)} of them "
                            "between commas, one a class")  # fmt: skip
        return found[0] if len(found) == 1 else found

    def logits(self, images: Iterable[ImageLike] | ImageLike) -> np.ndarray:
        """The logits f32[n, classes]; of several seeds [seeds, n, classes]."""
        return self._all("logits", images, -2)

    def features(self, images: Iterable[ImageLike] | ImageLike) -> np.ndarray:
        """What the head is given, f32[n, d]; of several seeds [seeds, n, d]."""
        return self._all("features", images, -2)

    def _all(self, what: Outputs, images: Iterable[ImageLike] | ImageLike, axis: int) -> np.ndarray:
        if isinstance(images, str | os.PathLike | bytes | Image.Image):
            images = [images]
        elif isinstance(images, np.ndarray) and images.ndim in (2, 3):
            images = images[None]
        rows = []
        for row in self.stream(what, images):
            if isinstance(row, UserError):
                raise row
            rows.append(row)
        if not rows:
            raise UserError("there are no images")
        return np.stack(rows, axis)

    def stream(self, what: Outputs, images: Iterable[ImageLike]) -> Iterator[np.ndarray | UserError]:
        """What the model computes of each image, in their order, or the error of one that cannot be used.

        Threads decode ahead of the device, and only a few batches are held, so that images may be endless. In several
        processes each decodes the images that its devices get; all of them give all results. An error of `images`
        itself, or of the device, is raised after the results of all images before it.
        """
        _ = self.programs.host_ops  # what is wrong with these is of no image
        program, mesh, data = getattr(self.programs, what), self.programs.mesh, self.programs.recipe.data
        size = sharding.round_up(min(self.config.batch_size, _BATCH), mesh)
        rows = sharding.rows_here(size, mesh)

        def begin(pool: concurrent.futures.Executor, start: int, some: tuple[ImageLike, ...]) -> list[Any]:
            mine = [(start + int(row), some[row]) for row in rows if row < len(some)]
            return [pool.submit(self._prepare_some, task) for task in itertools.batched(mine, _TASK)]

        def compute(some: tuple[ImageLike, ...], tasks: list[Any]) -> tuple[Any, dict[int, str]]:
            batch = np.zeros((rows.size, *data.image_shape), np.uint8)  # one shape, so one compilation
            here: dict[int, str] = {}
            for place, image in enumerate(itertools.chain.from_iterable(task.result() for task in tasks)):
                if isinstance(image, UserError):
                    here[int(rows[place])] = str(image)
                else:
                    batch[place] = image
            out = program(*self.state.evaluated, sharding.put_batch({"image": batch}, mesh)["image"])
            told = processes.gather("reading images", [[_name(image, row) for row, image in enumerate(some)], here])
            if any(names != told[0][0] for names, _ in told):
                raise UserError("the processes found different images: all must be given the same, on a shared disk")
            return out, {int(row): text for _, errors in told for row, text in errors.items()}

        def results(some: tuple[ImageLike, ...], out: Any, errors: dict[int, str]) -> Iterator[np.ndarray | UserError]:
            values = np.asarray(jax.device_get(out))
            for row, image in enumerate(some):
                value = values[..., row, :]
                if row in errors:
                    yield UserError(errors[row])
                elif wrong := not_finite(value, what):
                    yield UserError(f"{_name(image, row)}: {wrong}, so try another --checkpoint")
                else:
                    yield value

        with contextlib.ExitStack() as stack:
            pool = concurrent.futures.ThreadPoolExecutor(self.config.data.threads or os.cpu_count())
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            ahead: deque[tuple[tuple[ImageLike, ...], list[Any]]] = deque()
            pending: tuple[Any, ...] | None = None
            failure: list[Exception] = []

            def given() -> Iterator[ImageLike]:
                try:
                    yield from images
                except Exception as e:  # as of a folder that cannot be read; `batched` would drop what came before it
                    failure.append(e)

            start, batches = 0, itertools.batched(given(), size)
            while True:
                while len(ahead) < _AHEAD and (some := next(batches, ())):
                    ahead.append((some, begin(pool, start, some)))
                    start += len(some)
                if not ahead:
                    break
                some, tasks = ahead.popleft()
                computed: tuple[Any, ...] | None = None
                try:
                    computed = (some, *compute(some, tasks))
                except Exception as e:
                    failure.insert(0, e)
                if pending:
                    yield from results(*pending)  # while the device computes the next batch
                pending = computed
                if not computed:
                    break
            if pending:
                yield from results(*pending)
            if failure:
                raise failure[0]

    def _prepare_some(self, images: Iterable[tuple[int, ImageLike]]) -> list[np.ndarray | UserError]:
        out: list[np.ndarray | UserError] = []
        for place, image in images:
            name = _name(image, place)
            try:
                with named_warnings.about(name.__str__):
                    out.append(self.prepare(image, place))
            except UserError as e:
                out.append(UserError(f"{name}: {e}"))
        return out


def not_finite(values: np.ndarray, what: Outputs) -> str:
    """What is wrong with an image's outputs, "" if nothing is. Logits alone may be infinite, of classes ruled out."""
    kinds = {"NaN": np.isnan(values).any(), "infinite values": what != "logits" and np.isinf(values).any()}
    given = " and ".join(kind for kind, there in kinds.items() if there)
    return f"the model gives {given} for this image; its weights may hold NaN" if given else ""


def _name(image: ImageLike, place: int) -> str:
    """What messages call an image: its file, or its number among the images."""
    return str(image) if isinstance(image, str | os.PathLike) else f"image {place}"
