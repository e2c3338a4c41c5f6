"""A trained model as StableHLO: one file that JAX alone runs, on CPU, GPU and TPU, without this package.

The file is a zip archive of two members. `model.stablehlo` is what `jax.export` serializes: the parameters, the device
ops of evaluation, the network and the loss's link to probabilities. `metadata.json` says what it takes and gives.
"""

import datetime
import io
import json
import zipfile
from typing import Any

import jax
import numpy as np
from jax import export

from imgclf_jax.core import platform
from imgclf_jax.inference import Outputs
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
# {gives} = jax.jit(model.call)(images)   # {takes}"""


def program(model: Trained, what: Outputs) -> export.Exported:
    """The function uint8[b, h, w, c] → f32, b being any number, lowered for all of PLATFORMS at once.

    It is in XLA's own form, which runs everywhere, and for one device, since a mesh would be a part of the file.
    """
    programs = model.programs
    pure = programs.pure(what)
    params, model_state = jax.tree.map(np.asarray, jax.device_get(model.state.evaluated))
    (b,) = export.symbolic_shape("b")

    def function(images: jax.Array) -> jax.Array:
        return pure(params, model_state, images)

    images = jax.ShapeDtypeStruct((b, *programs.recipe.data.image_shape), np.uint8)
    # The bits of products are those of the config wherever the file is run; on CPU all are float32 in any case.
    with platform.tracing_for(""), jax.default_matmul_precision(model.config.matmul_precision):
        return export.export(jax.jit(function), platforms=PLATFORMS)(images)


def metadata(model: Trained, what: Outputs, exported: export.Exported, today: datetime.date) -> dict[str, Any]:
    """What the file takes and gives, as JSON values."""
    recipe = model.programs.recipe
    return {
        "gives": {"predict": "probabilities"}.get(what, what),
        "images": {"dtype": "uint8", "shape": ["b", *recipe.data.image_shape]},
        "host_ops": model.programs.preprocess_eval,
        "output": {"dtype": "float32", "shape": [str(n) if not isinstance(n, int) else n
                                                 for n in exported.out_avals[0].shape]},
        "class_names": list(model.class_names),
        "model": recipe.config.model,
        "step": model.step,
        "platforms": list(exported.platforms),
        "jax": jax.__version__,
        "written": today.isoformat(),
        "loads_until": (today + _LIVES).isoformat(),
    }  # fmt: skip


def archive(model: Trained, what: Outputs, today: datetime.date) -> tuple[bytes, dict[str, Any]]:
    """The bytes of the file, and its metadata."""
    exported = program(model, what)
    described = metadata(model, what, exported, today)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as file:
        file.writestr(zipfile.ZipInfo("model.stablehlo", _MADE), bytes(exported.serialize()))
        file.writestr(zipfile.ZipInfo("metadata.json", _MADE), json.dumps(described, indent=2, ensure_ascii=False))
    return content.getvalue(), described
