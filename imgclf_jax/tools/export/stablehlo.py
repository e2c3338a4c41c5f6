"""A trained model as StableHLO: one file that JAX alone runs, on CPU, GPU and TPU, without this package.

The file is a zip archive of two members. `model.stablehlo` is what `jax.export` serializes: the parameters, the device
ops of evaluation, the network and the loss's link to probabilities. `metadata.json` says what it takes and gives, and
until when JAX promises to load it.
"""

import datetime
import io
import json
import zipfile

import jax
import numpy as np
from jax import export

from imgclf_jax.core import platform, sharding
from imgclf_jax.core.text import escape_surrogates
from imgclf_jax.core.typing import Function, JsonObject, PyTree, Variables
from imgclf_jax.step import Outputs
from imgclf_jax.tools.export import compared
from imgclf_jax.trained import Trained

PLATFORMS = ("cpu", "cuda", "tpu")
_LIVES = datetime.timedelta(days=180)  # what jax.export promises of its files
_MADE = (1980, 1, 1, 0, 0, 0)  # the time of the members: the same model gives the same bytes

LOADER = """\
import json, zipfile, jax
from jax import export

archive = zipfile.ZipFile("{name}")
model = export.deserialize(bytearray(archive.read("model.stablehlo")))
classes = json.loads(archive.read("metadata.json"))["class_names"]
# {gives} = jax.jit(model.call)(images)   # {takes}
"""


def program(model: Trained, what: Outputs) -> export.Exported:
    """The function uint8[b, h, w, c] → f32, b being any number, lowered for all of PLATFORMS at once.

    It is for one device, since a mesh would be a part of the file.
    """
    function, variables = function_of_variables(model, what)
    return lower(lambda images: function(variables, images), model)


def function_of_variables(model: Trained, what: Outputs) -> tuple[Function, Variables]:
    """Returns the function (variables, images) → outputs, and the variables {"params", …} as NumPy arrays."""
    pure = model.programs.pure(what)
    params, model_state = jax.tree.map(sharding.fetch, model.state.evaluated)

    def function(variables: Variables, images: jax.Array) -> jax.Array:
        own = dict(variables)
        return pure(own.pop("params"), own, images)

    return function, {"params": params, **model_state}


def lower(function: Function, model: Trained, *arguments: PyTree) -> export.Exported:
    """Lowers a function of `arguments` and images, for any number of images."""
    (b,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((b, *model.programs.recipe.data.image_shape), np.uint8)
    # The matmul precision is the config's wherever the file runs; CPUs multiply float32 in full in any case.
    with platform.tracing_for(""), jax.default_matmul_precision(model.config.matmul_precision):
        return export.export(jax.jit(function), platforms=PLATFORMS)(*jax.eval_shape(lambda: arguments), images)


def metadata(model: Trained, what: Outputs, exported: export.Exported, today: datetime.date) -> JsonObject:
    """What the file takes and gives, as JSON values. Bytes of class names that are not UTF-8 are escaped."""
    recipe = model.programs.recipe
    return {
        "gives": compared.output_name(what),
        "images": {"dtype": "uint8", "shape": ["b", *recipe.data.image_shape]},
        "host_ops": model.programs.preprocess_eval,
        "output": {"dtype": "float32", "shape": [str(n) if not isinstance(n, int) else n
                                                 for n in exported.out_avals[0].shape]},
        "task": model.task.value,
        "class_names": list(map(escape_surrogates, model.class_names)),
        "model": recipe.config.model,
        "step": model.step,
        "calibrated": bool(model.programs.calibration),  # if it gives probabilities
        "platforms": list(exported.platforms),
        "jax": jax.__version__,
        "written": today.isoformat(),
    }  # fmt: skip


def archive(model: Trained, what: Outputs, today: datetime.date) -> tuple[bytes, str, float]:
    """Returns the bytes of the file, the day until JAX loads it, and the largest difference of its outputs.

    Raises UserError if they differ by more than rounding on random images, on the first device.
    """
    exported = program(model, what)
    until = (today + _LIVES).isoformat()
    described = metadata(model, what, exported, today) | {"loads_until": until}
    serialized, content = exported.serialize(), io.BytesIO()
    loaded = jax.jit(export.deserialize(serialized).call)
    difference = compared.difference(lambda images: np.asarray(loaded(images)), model, what, "JAX")
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as file:
        file.writestr(zipfile.ZipInfo("model.stablehlo", _MADE), bytes(serialized))
        file.writestr(zipfile.ZipInfo("metadata.json", _MADE), json.dumps(described, indent=2, ensure_ascii=False))
    return content.getvalue(), until, difference
