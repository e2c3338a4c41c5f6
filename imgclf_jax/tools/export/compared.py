"""Comparison of an exported file's outputs, in another runtime, with the model's."""

from collections.abc import Callable

import numpy as np

from imgclf_jax import losses
from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.step import Outputs
from imgclf_jax.trained import Trained

_IMAGES = 5
_CLOSE = {"float32": 1e-4, "bfloat16": 2**-5}  # allowed difference for outputs of magnitude 1, by `precision`
_MIN = 1e-30  # smaller probabilities count as equal
_OF_SIGMOID = 1e-6  # onnxruntime's sigmoid has an absolute error of up to 1.7e-7


def output_name(what: Outputs) -> str:
    """Returns the name of a file's output: "probabilities", "logits" or "features"."""
    return "probabilities" if what == "predict" else what


def difference(run: Callable[[np.ndarray], np.ndarray], model: Trained, what: Outputs, program: str) -> float:
    """Returns the largest difference of `run(uint8[b, h, w, c])` from the model's outputs on five random images.

    Raises UserError, naming the `program`, if it exceeds the rounding of the model's precision. Probabilities are
    compared by logarithm, because those of two overconfident networks may agree to 1e-9. Those of a sigmoid may also
    differ by 1e-6.
    """
    mesh = model.programs.mesh
    shape = (sharding.round_up(_IMAGES, mesh), *model.programs.recipe.data.image_shape)
    images = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    ours = np.asarray(model.programs.inference(what)(*model.state.evaluated, sharding.put_batch(images, mesh)))
    ours, theirs = ours[..., :_IMAGES, :], run(images[:_IMAGES])
    judged, a, b = ("outputs", theirs, ours)
    if what == "predict":
        judged, a, b = ("log probabilities", *(np.log(np.maximum(x, _MIN)) for x in (theirs, ours)))
    allowed = np.full(b.shape, _CLOSE[model.config.precision] * max(1.0, float(np.abs(b).max())))
    if judged == "log probabilities" and losses.link_of(model.config.loss) == losses.SIGMOID:
        allowed += _OF_SIGMOID / np.maximum(ours, _MIN)
    if not (np.abs(a - b) <= allowed).all():
        raise UserError(f"export: {program}'s {judged} differ from the model's by up to {np.abs(a - b).max():.2g}, so "
                        f"no file is written; {program} mistranslates model={model.config.model!r}")  # fmt: skip
    return float(np.abs(theirs - ours).max())
