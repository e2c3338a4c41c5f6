"""The command `export`: writes a trained model for JAX, TensorFlow, ONNX runtimes and PyTorch."""

import datetime
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from imgclf_jax.core import paths, sharding, tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import one_per_line
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.step import Outputs
from imgclf_jax.tools.export import compared, onnx, saved_model, stablehlo, torch_state
from imgclf_jax.tools.export.formats import SUFFIXES
from imgclf_jax.trained import Trained, load_trained
from imgclf_jax.weights import pretrained

_OUTPUTS: dict[str, Outputs] = {"probabilities": "predict", "logits": "logits", "features": "features"}


def main(
    config: ConfigDict, workdir: Workdir | None, files: list[str], checkpoint: str, gives: str, names: str,
    temperature: float | None = None,
) -> int:  # fmt: skip
    """Writes a model to each of `files`, whose suffixes select the formats.

    - `workdir` is the run to export; None exports the weights that `init_from` names.
    - `gives` is the output of the exported function: "probabilities", "logits" or "features".
    - `names` is the naming scheme of PyTorch weights (see `torch_state.naming`).
    - `temperature` divides the logits of probabilities, instead of the run's calibration.

    Raises UserError for parameters or statistics that hold NaN, and for user code that needs a fixed number of images;
    `formats.check` has checked the files.
    """
    model = load_trained(config, workdir, checkpoint, temperature)
    params, model_state = model.state.evaluated
    for name, array in tree.named_leaves({"params": params, **model_state}):
        if np.isnan(sharding.fetch(array)).any():
            raise UserError(f"export: step {model.step} holds NaN, as in {name}; export another --checkpoint")
    try:
        for path in map(Path, files):
            print("\n".join(KINDS[path.suffix](model, path, _OUTPUTS[gives], names)))
    except TypeError as e:
        if "_DimExpr" not in str(e):  # JAX's symbolic number of images, used as an integer
            raise
        raise UserError(f"export: {model.programs.recipe.own_code} needs the number of images as a Python integer, but "
                        "a file serves any number; write x.shape[0] instead of len(x)") from e  # fmt: skip
    return 0


def _stablehlo(model: Trained, path: Path, what: Outputs, names: str) -> list[str]:
    content, until, difference = stablehlo.archive(model, what, datetime.date.today())
    paths.write_atomically(path, content)
    until = f"JAX from {jax.__version__} to versions of {until} can load it; after that, export again."
    return _describe(model, path, what, "JAX", difference, until, "", stablehlo.LOADER)


def _saved_model(model: Trained, path: Path, what: Outputs, names: str) -> list[str]:
    difference = saved_model.write(model, what, path, datetime.date.today())
    return _describe(model, path, what, "TensorFlow", difference, "", saved_model.LOADER)


def _onnx(model: Trained, path: Path, what: Outputs, names: str) -> list[str]:
    content, difference = onnx.archive(model, what)
    paths.write_atomically(path, content)
    return _describe(model, path, what, "onnxruntime", difference)


def _describe(model: Trained, path: Path, what: Outputs, runtime: str, difference: float, *more: str) -> list[str]:
    """What is printed of a file; in the code of `more` that loads it, its names replace their placeholders."""
    (h, w, c), gives = model.programs.recipe.data.image_shape, compared.output_name(what)
    takes = f"uint8[b, {h}, {w}, {c}], any b"
    return [f"{path}: {gives} of uint8 images [b, {h}, {w}, {c}]",
            f"{runtime}'s outputs match the model's on five random images, up to {difference:.1e}.",
            *(text.format(name=path, gives=gives, takes=takes) for text in more)]  # fmt: skip


def _safetensors(model: Trained, path: Path, what: Outputs, names: str) -> list[str]:
    from safetensors.numpy import save

    recipe = model.programs.recipe
    backbone, merge = recipe.plain_model.backbone, recipe.method.merge or (lambda variables: variables)
    names = torch_state.naming(backbone, names)
    params, model_state = jax.tree.map(sharding.fetch, model.state.evaluated)
    variables = {"params": params, **model_state}
    metadata = {"format": "pt", "flattened": "chw", "model": recipe.config.model, "names": names,
                "augment": recipe.config.augment, "loss": recipe.config.loss,
                "host_ops": model.programs.preprocess_eval}  # fmt: skip
    metadata |= {"grid": "{}x{}".format(*grid)} if (grid := pretrained.patch_grid(model.programs)) else {}
    metadata |= {"task": model.task.value, "class_names": one_per_line(model.class_names)}
    lines = []
    for seed in range(num_seeds := recipe.config.num_seeds):
        own = variables if num_seeds == 1 else jax.tree.map(lambda x, seed=seed: np.asarray(x)[seed], variables)
        file = path if num_seeds == 1 else path.with_suffix(f".seed{recipe.config.seed + seed}{path.suffix}")
        state = torch_state.state_dict(backbone, merge(own), names, recipe.data.image_shape)
        paths.write_atomically(file, _with_sorted_metadata(save(state, metadata)))
        lines.append(f"{file}: {len(state)} arrays, named by the scheme {names}")
    if added := sorted({*params} - {"backbone", "head"}):
        lines.append(f"Not exported: {', '.join(added)} of method={recipe.config.method!r}, which no classifier has.")
    if recipe.method.merge:
        lines.append(f"The weights of method={recipe.config.method!r} are merged into the plain model.")
    if model.programs.calibration:
        lines.append("The weights are the network's own: its calibration is not in them.")
    if not recipe.method.predicts:
        lines.append(f"There is no head, because method={recipe.config.method!r} trains none.")
    return lines


def _with_sorted_metadata(content: bytes) -> bytes:
    """A safetensors file whose metadata have a fixed order: the library writes another one each time."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    head = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # aligns the arrays, as the library does
    return b"".join([len(head).to_bytes(8, "little"), head, memoryview(content)[end:]])


Writer = Callable[[Trained, Path, Outputs, str], list[str]]

KINDS: dict[str, Writer] = dict(zip(SUFFIXES, (_stablehlo, _saved_model, _onnx, _safetensors), strict=True))
