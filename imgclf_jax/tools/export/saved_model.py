"""Export to a TensorFlow SavedModel, which runs without JAX.

Its function is StableHLO in TensorFlow's operation XlaCallModule, as in `jax2tf`. But `jax2tf` writes a StableHLO
version that only TensorFlow releases of the same weeks read: jax 0.12 writes 1.18, and TensorFlow 2.21 knows 1.13. So
this module makes the operation with the oldest version of StableHLO. The weights are variables outside of the graph,
which holds at most 2 GB.
"""

import datetime
import json
import os
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax import export
from jax.extend import mlir
from jax.extend.mlir import passmanager
from jax.extend.mlir.dialects import stablehlo as dialect

from imgclf_jax.core import paths, tree
from imgclf_jax.core.tensorflow_import import tensorflow
from imgclf_jax.core.text import escape_surrogates
from imgclf_jax.step import Outputs
from imgclf_jax.tools.export import compared, stablehlo
from imgclf_jax.trained import Trained

# The calling convention of XlaCallModule. Version 10 differs only in sharding, and TensorFlow 2.19 does not know it.
_CALLING = 9

LOADER = """\
import tensorflow as tf

model = tf.saved_model.load("{name}")
names = model.signatures["class_names"]()["class_names"].numpy()
classes = [name.decode() for name in names]
function = model.signatures["serving_default"]
# images: {takes}
# {gives} = function(images=images)["{gives}"].numpy()
"""


def write(model: Trained, what: Outputs, folder: Path, today: datetime.date) -> float:
    """Writes the SavedModel, and returns the largest difference of TensorFlow's outputs.

    The signature `serving_default` maps `images`, uint8[b, h, w, c] with b ≥ 1, to `probabilities`, `logits` or
    `features`; `class_names` takes nothing and returns strings. The metadata are in
    `assets.extra/metadata.json`. An existing SavedModel is replaced once the new one matches the model's outputs on
    random images. Raises UserError if it does not match.
    """
    tf: Any = tensorflow().result()
    function, variables = stablehlo.function_of_variables(model, what)
    exported = stablehlo.lower(function, model, variables)
    described = stablehlo.metadata(model, what, exported, today)
    gives = described["gives"]
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as made:
        temporary = Path(made, "new")
        module = _module(tf, exported, dict(tree.named_leaves(variables)), model, gives)
        tf.saved_model.save(module, str(temporary), {"serving_default": module.call, "class_names": module.names})
        loaded = tf.saved_model.load(str(temporary)).signatures["serving_default"]
        difference = compared.difference(
            lambda images: np.asarray(loaded(images=tf.constant(images))[gives]), model, what, "TensorFlow"
        )
        extra = temporary / "assets.extra"
        extra.mkdir()
        paths.write_atomically(extra / "metadata.json", json.dumps(described, indent=2, ensure_ascii=False))
        if os.path.lexists(folder):
            folder.rename(Path(made, "old"))
        temporary.rename(folder)
    return difference


def _module(
    tf: ModuleType, exported: export.Exported, weights: dict[str, np.ndarray], model: Trained, gives: str
) -> Any:
    """Returns a `tf.Module` with the variables and the functions `call` and `names`."""
    from tensorflow.compiler.tf2xla.python import xla  # `jax2tf` uses it too

    shape = model.programs.recipe.data.image_shape
    [out] = exported.out_avals
    attributes = {
        "version": _CALLING, "module": portable(exported), "platforms": [name.upper() for name in exported.platforms],
        "Tout": [tf.float32], "Sout": [[n if isinstance(n, int) else None for n in out.shape]],
    }  # fmt: skip

    def call(images: Any) -> dict[str, Any]:
        arguments = [*module.weights.values(), images]
        return {gives: xla.call_module([arguments[i] for i in exported.module_kept_var_idx], **attributes)[0]}

    module = tf.Module()
    module.weights = {name: tf.Variable(array, trainable=False, name=name) for name, array in weights.items()}
    images = tf.TensorSpec([None, *shape], tf.uint8, "images")
    module.call = tf.function(call, input_signature=[images], autograph=False)
    names = list(map(escape_surrogates, model.class_names))
    module.names = tf.function(lambda: {"class_names": tf.constant(names)}, input_signature=[], autograph=False)
    return module


def portable(exported: export.Exported) -> bytes:
    """Returns the module in the oldest version of StableHLO, with composites such as `erf` replaced by calls.

    TensorFlow cannot refine the dynamic batch size inside composites. An operation that is newer raises JAX's error.
    """
    dummy: Any = jax.jit(lambda: 0).lower().compiler_ir()
    with dummy.context:  # has JAX's dialects registered
        dialect.register_stablehlo_passes()
        module = exported.mlir_module(serialized=False)
        calls = "builtin.module(func.func(stablehlo-legalize-composite-to-call))"
        passmanager.PassManager.parse(calls).run(module.operation)
        text = str(module)
    return bytes(mlir.serialize_portable_artifact(text, dialect.get_minimum_version()))
