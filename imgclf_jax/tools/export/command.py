"""The command `export`: writes a trained model for JAX, TensorFlow, ONNX runtimes and PyTorch."""

import datetime
import json
import logging
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from imgclf_jax.core import paths, sharding, tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import one_per_line
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.step import Outputs
from imgclf_jax.tools.export import compared, onnx, saved_model, stablehlo, torch_state
from imgclf_jax.tools.export.formats import SUFFIXES
from imgclf_jax.trained import Trained, load_trained
from imgclf_jax.weights import pretrained

log = logging.getLogger(__name__)

_OUTPUTS: dict[str, Outputs] = {"probabilities": "predict", "logits": "logits", "features": "features"}


def main(config: ConfigDict, workdir: Workdir | None, files: list[str], checkpoint: str, gives: str, names: str) -> int:
    """Writes a model to each of `files`, whose suffixes select the formats.

    - `workdir` is the run to export; None exports the weights that `init_from` names.
    - `gives` is the output of the exported function: "probabilities", "logits" or "features".
    - `names` is the naming scheme of PyTorch weights (see `torch_state.naming`).

    Raises UserError for parameters or statistics that hold NaN; `formats.check` has checked the flags.
    """
    model = load_trained(config, workdir, checkpoint)
    _refuse_nan(model)
    for path in map(Path, files):
        for line in KINDS[path.suffix](model, path, gives, names):
            print(line)
    return 0


def _refuse_nan(model: Trained) -> None:
    params, model_state = model.state.evaluated
    arrays = tree.named_leaves({"params": params, **(model_state or {})})
    wrong = [name for name, x in arrays if np.isnan(sharding.fetch(x)).any()]
    if wrong:
        raise UserError(f"export: step {model.step} holds NaN in {len(wrong)} of {len(arrays)} arrays, as in "
                        f"{wrong[0]}; export another --checkpoint")  # fmt: skip


def _stablehlo(model: Trained, path: Path, gives: str, names: str) -> list[str]:
    content, described, difference = stablehlo.archive(model, _OUTPUTS[gives], datetime.date.today())
    paths.write_atomically(path, content)
    note = (
        f"Its outputs match on five random images, up to {difference:.1e}.\n"
        f"JAX from {jax.__version__} to versions of {described['loads_until']} can load it; after that, export again."
    )
    return _with_loader(path, described, note, stablehlo.LOADER)


def _saved_model(model: Trained, path: Path, gives: str, names: str) -> list[str]:
    described, difference = saved_model.write(model, _OUTPUTS[gives], path, datetime.date.today())
    note = f"TensorFlow's outputs match on five random images, up to {difference:.1e}."
    return _with_loader(path, described, note, saved_model.LOADER)


def _with_loader(path: Path, described: JsonObject, note: str, loader: str) -> list[str]:
    """Describes a file by its metadata, followed by `note` and the code that loads it."""
    h, w, c = described["images"]["shape"][1:]
    gives = described["gives"]
    return [
        f"{path}: {_size(path)}, {gives} of uint8 images [b, {h}, {w}, {c}], for {', '.join(described['platforms'])}",
        note,
        "",
        loader.format(name=path, gives=gives, takes=f"uint8[b, {h}, {w}, {c}], any b"),
    ]


def _onnx(model: Trained, path: Path, gives: str, names: str) -> list[str]:
    content, difference = onnx.archive(model, _OUTPUTS[gives])
    paths.write_atomically(path, content)
    h, w, c = model.programs.recipe.data.image_shape
    return [
        f"{path}: {_size(path)}, {compared.output_name(model, _OUTPUTS[gives])} of uint8 images [b, {h}, {w}, {c}]",
        f"onnxruntime's outputs match on five random images, up to {difference:.1e}.",
    ]


def _safetensors(model: Trained, path: Path, gives: str, names: str) -> list[str]:
    from safetensors.numpy import save

    recipe = model.programs.recipe
    backbone, merge = recipe.backbone, recipe.method.merge or (lambda variables: variables)
    names = torch_state.naming(backbone, names)
    params, model_state = jax.tree.map(sharding.fetch, model.state.evaluated)
    variables = {"params": params, **(model_state or {})}
    metadata = {"format": "pt", "model": recipe.config.model, "names": names, "augment": recipe.config.augment,
                "loss": recipe.config.loss, "host_ops": model.programs.preprocess_eval}  # fmt: skip
    metadata |= {"grid": "{}x{}".format(*grid)} if (grid := pretrained.patch_grid(model.programs)) else {}
    metadata |= {"task": model.task.value, "class_names": one_per_line(model.class_names)}
    lines = []
    for seed in range(recipe.num_seeds):
        own = variables if recipe.num_seeds == 1 else jax.tree.map(lambda x, seed=seed: np.asarray(x)[seed], variables)
        file = path if recipe.num_seeds == 1 else path.with_suffix(f".seed{recipe.config.seed + seed}{path.suffix}")
        state = torch_state.state_dict(backbone, merge(own), names, recipe.data.image_shape)
        paths.write_atomically(file, _with_sorted_metadata(save(state, metadata)))
        lines.append(f"{file}: {_size(file)}, {len(state)} arrays, named by the scheme {names}")
    if added := sorted({*params} - {"backbone", "head"}):
        lines.append(f"Not exported: {', '.join(added)} of method={recipe.config.method!r}, which no classifier has.")
    if recipe.method.merge:
        lines.append(f"The weights of method={recipe.config.method!r} are merged into the plain model.")
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


def _size(path: Path) -> str:
    files = path.rglob("*") if path.is_dir() else [path]
    return f"{sum(file.stat().st_size for file in files if file.is_file()) / 1e6:.1f} MB"


Writer = Callable[[Trained, Path, str, str], list[str]]

KINDS: dict[str, Writer] = dict(zip(SUFFIXES, (_stablehlo, _saved_model, _onnx, _safetensors), strict=True))
