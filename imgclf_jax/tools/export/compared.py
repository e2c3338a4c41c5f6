"""Whether what another program makes of a file is what the model gives."""

from collections.abc import Callable

import jax
import numpy as np

from imgclf_jax import losses
from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.losses import Task
from imgclf_jax.step import Outputs
from imgclf_jax.trained import Trained

_IMAGES = 5
_CLOSE = 1e-4  # how far the outputs may be from ours, of outputs about 1
_LEAST = 1e-30  # probabilities below are not told apart
_OF_SIGMOID = 1e-6  # onnxruntime's sigmoid is off by up to 1.7e-7, whatever its value


def output_name(model: Trained, what: Outputs) -> str:
    """What the output of a file is called: "probabilities", in a regression "values", "logits" or "features"."""
    return ("values" if model.task is Task.REGRESSION else "probabilities") if what == "predict" else what


def difference(run: Callable[[np.ndarray], np.ndarray], model: Trained, what: Outputs, program: str) -> float:
    """How far the outputs of `run`, a function of images uint8[b, h, w, c], are from the model's on random images.

    Raises UserError, which names the `program` that runs it, if that is more than the roundings of float32. Of
    probabilities the logarithms are judged: of a network that is sure of each of these images, another one that is sure
    of the same classes has the same probabilities but for 1e-9. Those of a sigmoid may be off by 1e-6 besides.
    """
    mesh = model.programs.mesh
    shape = (_IMAGES, *model.programs.recipe.data.image_shape)
    images = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    padded = np.zeros((sharding.round_up(_IMAGES, mesh), *shape[1:]), np.uint8)
    padded[:_IMAGES] = images
    batch = sharding.put_batch({"image": padded[sharding.rows_here(len(padded), mesh)]}, mesh)["image"]
    ours = np.asarray(jax.device_get(getattr(model.programs, what)(*model.state.evaluated, batch)))
    ours, theirs = ours[..., :_IMAGES, :], run(images)
    judged, a, b = ("outputs", theirs, ours)
    if what == "predict" and model.task is not Task.REGRESSION:
        judged, a, b = ("log probabilities", *(np.log(np.maximum(x, _LEAST)) for x in (theirs, ours)))
    allowed = np.full(b.shape, _CLOSE * max(1.0, float(np.abs(b).max())))
    if judged == "log probabilities" and losses.link_of(model.config.loss) == losses.SIGMOID:
        allowed += _OF_SIGMOID / np.maximum(ours, _LEAST)
    apart = _furthest(a, b)
    if not (np.abs(a - b) <= allowed).all():
        raise UserError(f"export: {program}'s {judged} differ from the model's by up to {apart:.2g}, so no file "
                        f"is written; model={model.config.model!r} is translated wrongly")  # fmt: skip
    return _furthest(theirs, ours)


def _furthest(theirs: np.ndarray, ours: np.ndarray) -> float:
    return float(np.abs(theirs - ours).max())
