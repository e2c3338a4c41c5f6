"""A trained model as a TensorFlow SavedModel: a folder that TensorFlow runs by itself.

Its function is StableHLO in TensorFlow's operation XlaCallModule, as `jax2tf` writes it. But `jax2tf` writes a version
of StableHLO that only TensorFlows of the same weeks read: jax 0.12 writes 1.18, and TensorFlow 2.21, which knows 1.13,
refuses it. So the operation is made here, of the oldest version of StableHLO. The weights are variables beside it,
since a graph holds 2 GB at most.
"""

import contextlib
import datetime
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from jax.extend import mlir
from jax.extend.mlir import passmanager
from jax.extend.mlir.dialects import stablehlo as dialect

from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.core.tensorflow_import import tensorflow
from imgclf_jax.step import Outputs
from imgclf_jax.tools.export import compared, stablehlo
from imgclf_jax.trained import Trained

# How XlaCallModule calls the module. Version 10 differs in how arrays are split over devices, of which there is one
# here, and TensorFlow 2.19 does not know it.
_CALLING = 9

LOADER = """\
import tensorflow as tf

model = tf.saved_model.load("{name}")
classes = [name.decode() for name in model.signatures["class_names"]()["class_names"].numpy()]
function = model.signatures["serving_default"]
# {gives} = function(images=images)["{gives}"].numpy()   # {takes}"""


def check(folder: Path) -> None:
    """Raises UserError unless TensorFlow is installed and a SavedModel can be written to `folder`."""
    if tensorflow().result() is None:
        raise UserError("export: a .savedmodel needs TensorFlow, which is not installed; install it by `uv sync` or "
                        "`pip install 'imgclf_jax[tfds]'`, on Python before 3.14")  # fmt: skip
    if folder.exists() and not (folder / "saved_model.pb").is_file():
        raise UserError(f"export: {folder} is there already and is no SavedModel; remove it, or write to another name")


def write(model: Trained, what: Outputs, folder: Path, today: datetime.date) -> tuple[dict[str, Any], float]:
    """Writes the SavedModel; its metadata, and the largest difference between TensorFlow's outputs and ours.

    The signature `serving_default` takes `images`, uint8[b, h, w, c], b being any number from 1 on, and gives one
    output, called `probabilities` (`values` in a regression), `logits` or `features`; `class_names` takes nothing and
    gives strings. The metadata are in `assets.extra/metadata.json`. A SavedModel that is there is replaced once the new
    one gives the model's outputs on random images. Raises UserError if it does not.
    """
    tf = tensorflow().result()
    exported, weights = stablehlo.program_of_weights(model, what)
    described = stablehlo.metadata(model, what, exported, today)
    gives = described["gives"]
    with _replacing(folder) as temporary:
        try:
            module = _module(tf, exported, weights, model, gives)
            tf.saved_model.save(module, str(temporary), {"serving_default": module.call, "class_names": module.names})
            function = tf.saved_model.load(str(temporary)).signatures["serving_default"]
            difference = compared.difference(
                lambda images: np.asarray(function(images=tf.constant(images))[gives]), model, what, "TensorFlow"
            )
        except tf.errors.InvalidArgumentError as e:
            raise UserError(f"export: TensorFlow {tf.__version__} cannot run model={model.config.model!r}; export it "
                            "as .stablehlo") from e  # fmt: skip
        except tf.errors.OpError as e:
            raise OSError(None, reason(e), str(folder)) from e
        extra = temporary / "assets.extra"
        extra.mkdir()
        (extra / "metadata.json").write_text(json.dumps(described, indent=2, ensure_ascii=False), encoding="utf-8")
    return described, difference


def _module(tf: Any, exported: export.Exported, weights: dict[str, np.ndarray], model: Trained, gives: str) -> Any:
    """A `tf.Module` of the variables and of the functions `call` and `names`."""
    from tensorflow.compiler.tf2xla.python import xla  # of which `jax2tf` too has the operation

    shape = model.programs.recipe.data.image_shape
    [out] = exported.out_avals
    attributes = {
        "version": _CALLING, "module": portable(exported), "platforms": [name.upper() for name in exported.platforms],
        "Tout": [tf.float32], "Sout": [[n if isinstance(n, int) else None for n in out.shape]],
    }  # fmt: skip

    def call(images: Any) -> dict[str, Any]:
        given = [*module.weights.values(), images]
        return {gives: xla.call_module([given[i] for i in exported.module_kept_var_idx], **attributes)[0]}

    module = tf.Module()
    module.weights = {name: tf.Variable(array, trainable=False, name=name) for name, array in weights.items()}
    images = tf.TensorSpec([None, *shape], tf.uint8, "images")
    module.call = tf.function(call, input_signature=[images], autograph=False)
    module.names = tf.function(
        lambda: {"class_names": tf.constant(list(model.class_names))}, input_signature=[], autograph=False
    )
    return module


def portable(exported: export.Exported) -> bytes:
    """The module in the oldest version of StableHLO's format, without composite operations.

    A composite, such as the error function, names a function that computes it, and becomes a call of this function.
    TensorFlow cannot put the number of images into composites. Raises UserError for an operation that is newer.
    """
    oldest = dialect.get_minimum_version()
    anything: Any = jax.jit(lambda: 0).lower().compiler_ir()
    with anything.context:  # which knows the dialects of JAX's modules
        dialect.register_stablehlo_passes()
        module = exported.mlir_module(serialized=False)
        calls = "builtin.module(func.func(stablehlo-legalize-composite-to-call))"
        passmanager.PassManager.parse(calls).run(module.operation)
        text = str(module)
    try:
        return bytes(mlir.serialize_portable_artifact(text, oldest))
    except jax.errors.JaxRuntimeError as e:
        operation = re.search(r"operation '(\S+)'", str(e))
        raise UserError(f"export: the model's operation {operation[1] if operation else ''} is newer than StableHLO "
                        f"{oldest}, which TensorFlow reads; export it as .stablehlo") from e  # fmt: skip


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A name to write a folder to; it becomes `folder` at the end, in place of one that is there."""
    temporary, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("tmp", "old"))
    try:
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)
        yield temporary
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    finally:
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)
