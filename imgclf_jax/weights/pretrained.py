"""Loads the weights of `init_from`, a file or another run: takes those that fit the model and reports the rest."""

import difflib
import functools
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from imgclf_jax import losses
from imgclf_jax.augment import ops
from imgclf_jax.core import processes, spec, tree
from imgclf_jax.core.errors import UserError, no_such, reason
from imgclf_jax.core.text import one_per_line
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.methods import lora
from imgclf_jax.models.resnet import ResNet
from imgclf_jax.models.vit import ViT
from imgclf_jax.programs import Programs
from imgclf_jax.run import digests
from imgclf_jax.run.checkpoint import Checkpoints
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.weights import files, initial, torch_names
from imgclf_jax.weights.catalog import Published

log = logging.getLogger(__name__)

_HEAD, _POSITIONS = "params/head/", "/positions_embedding"
_TOKENS = {"cls", "cls_token", "class_token", "dist_token"}  # names of tokens that have positions before the grid's

type Grid = tuple[int, int]  # (rows, columns) of patches


@dataclass
class Weights:
    """What `init_from` holds, what of it is taken, by path as in `step.init_state`, and a report of the rest."""

    source: JsonObject  # for provenance.json: the path, its SHA-256 and, for a work directory, the step
    # What a run has recorded, or `export` wrote into a .safetensors file: keys of the config, `class_names`, one per
    # line, and `grid`, the patches of a model that has any, as "14x14".
    record: JsonObject
    found: dict[str, np.ndarray]  # all arrays that have one of our names
    labels: dict[str, str]  # {our name: name in the file}
    unused: list[str] = field(default_factory=list)  # names in the file that the model does not have
    taken: dict[str, np.ndarray] = field(default_factory=dict)
    head: str = ""  # why the head starts from random weights; empty if it is taken
    notes: list[str] = field(default_factory=list)  # what is resized or adapted, and modules of the methods of the runs
    misfits: list[str] = field(default_factory=list)  # arrays of another shape than the model's
    missing: list[str] = field(default_factory=list)  # names in the model that the file does not have
    wanted: str = ""  # the name that a file would have for the first missing one

    @property
    def faults(self) -> list[str]:
        """Descriptions of what does not fit. A new head, resized positions and a method's modules are no faults."""
        kinds = {"of another shape": self.misfits, "of the model missing in it": self.missing,
                 "in it that the model does not have": self.unused}  # fmt: skip
        found = [f"{len(names)} arrays {text} ({_some(names)})" for text, names in kinds.items() if names]
        if near := difflib.get_close_matches(self.wanted, self.unused, 3, 0.0) if self.missing else []:
            found[-1] += f", of which the nearest to {self.wanted} are {' and '.join(near)}"
        return found


def load(programs: Programs, whole: bool = False) -> Weights:
    """Loads the weights of `config.init_from` for the model of `programs`, and logs a report.

    Position embeddings of another grid are resized; the grid of a file is the one in its metadata, else that of the
    model if it has as many patches, else square. A head with another number of classes is not taken, nor are modules
    that the other run's method added; modules that this run's method adds stay random. Raises UserError for a file or
    work directory that cannot be read, and, unless `config.init_strict` is False, for any other difference. With
    `whole`, also raises UserError if any parameter, including the head's, stays random, and if a run or an exported
    file says that it was trained for other classes or with another normalization, link or model.
    """
    config = programs.recipe.config
    start, what = initial.parse(config.init_from), f"init_from={config.init_from!r}"
    file, _, container = start.at.partition("::")
    path, located = initial.locate(file)
    leaves = tree.named_leaves({"params": programs.state_shape.params, **programs.state_shape.model_state})
    own: dict[str, Any] = {name: jax.ShapeDtypeStruct(x.shape[config.num_seeds > 1 :], x.dtype) for name, x in leaves}
    if (workdir := Workdir(path)).config.is_file() and not container:
        weights = _read_workdir(workdir)
    elif path.is_dir() and not container:
        raise UserError(f"{what}: this directory holds no run: there is no {workdir.config}")
    elif path.is_file():
        heads = {f"{_HEAD}{leaf}": jax.ShapeDtypeStruct((), "float32") for leaf in ("kernel", "bias")}
        weights = _read_file(path, container, programs, heads | own)  # a head has a name even if the model has none
    else:
        raise no_such("init_from", "file or work directory", path)
    processes.agree(lambda: weights.source, fix=f"init_from={config.init_from!r} must be one file for all")
    weights.source = {"path": config.init_from, **located, **weights.source}
    _fit(weights, own, patch_grid(programs))
    if weights.missing:  # what a file would call the first
        backbone = programs.recipe.plain_model.backbone
        library = next(iter(torch_names.tables(backbone)), "own") if path.is_file() else ""
        first = weights.missing[0]
        weights.wanted = (library and torch_names.torch_names(backbone, list(own), library)[first]) or first
    if config.init_strict and any(name.startswith(lora.PREFIX) for name in weights.found.keys() - own.keys()):
        raise UserError(f"{what} holds LoRA adapters, which only its own method can merge into the backbone; name a "
                        ".safetensors file that export wrote of this run, or leave the adapters out with "
                        "init_strict=False")  # fmt: skip
    if not any(not name.startswith(_HEAD) for name in weights.taken):
        raise UserError(f"{what}: nothing in it fits model={config.model!r}: {'; '.join(weights.faults)}")
    if config.init_strict and weights.faults:
        raise UserError(f"{what} does not fit model={config.model!r}: {'; '.join(weights.faults)}; set model to the "
                        "model of these weights, or take what fits with init_strict=False")  # fmt: skip
    if start.published:
        _check_published(programs, start.published, what)
    if whole:
        _check_whole(programs, weights, what)
    report = "; ".join([f"{len(weights.taken)} arrays taken", *weights.faults, *weights.notes])
    log.log(logging.WARNING if weights.faults else logging.INFO, "%s: %s", what, report)
    return weights


def _module_of(name: str) -> str:
    """The part of a model that has a variable: "backbone", "head", a module of a method, or "lora" in the backbone."""
    return "lora" if name.startswith(lora.PREFIX) else name.split("/")[1]


def _read_workdir(workdir: Workdir) -> Weights:
    """Reads the weights of a run's best checkpoint, else its latest; of several seeds, the first."""
    what, config = f"init_from={str(workdir.path)!r}", workdir.load_config()
    if (last := workdir.last_checkpoint()) is None:
        raise UserError(f"{what}: this run has no checkpoint yet")
    checkpoints = Checkpoints(workdir.checkpoints, best=config.checkpoint.best, read_only=True)
    step = last if (best := checkpoints.best_step()) is None else best
    state = checkpoints.restore(step, optimizer=False)["state"]
    digests.check(workdir, step, state["params"])
    # The evaluated weights: the averages (params, model_state) if the run has any.
    params, model_state = state.get("eval_variables") or (state["params"], state.get("model_state"))
    variables = jax.device_get({"params": params, **(model_state or {})})
    if config.num_seeds > 1:
        log.info("%s: the run has %d seeds; the first one's weights are taken", what, config.num_seeds)
        variables = jax.tree.map(lambda x: x[0], variables)
    digest = tree.sha256(variables)
    if scale := lora.scale_of(config.method):
        log.info("%s: the run has method=%r; its merged weights are taken", what, config.method)
        variables = lora.merge(variables, scale)
    named, data = dict(tree.named_leaves(variables)), workdir.load_data_info()
    record = {**config.to_dict(), "class_names": one_per_line(data.class_names)}
    if (kernel := named.get("params/backbone/patch/kernel")) is not None:
        h, w, _ = data.image_shape
        record["grid"] = f"{h // kernel.shape[0]}x{w // kernel.shape[1]}"
    return Weights({"step": step, "sha256": digest}, record, named, {name: name for name in named})


def _read_file(path: Path, container: str, programs: Programs, own: Mapping[str, jax.ShapeDtypeStruct]) -> Weights:
    """Reads a file of PyTorch's names and layouts: see `files.read`. Logs what is assumed of them."""
    backbone, (arrays, metadata, sha256) = programs.recipe.plain_model.backbone, files.read(path, container)
    old = "names" in metadata and "flattened" not in metadata  # `export` once wrote rows in our order
    flattened = {} if old else torch_names.flattened(backbone, programs.recipe.data.image_shape, own)
    named, labels, unused = {}, {}, list[str]()
    if isinstance(backbone, ViT):
        try:
            arrays = torch_names.as_timm(arrays)
        except (ValueError, TypeError, IndexError) as e:
            raise UserError(f"{path} holds arrays that do not fit together ({reason(e)})") from e
    for label, array in arrays.items():
        name = torch_names.own_name(backbone, label, own)
        if name and name not in named:
            named[name] = torch_names.own_layout(array, name, own[name].shape, flattened.get(name, 1))
            labels[name] = label
        elif not label.endswith("num_batches_tracked"):  # a counter that BatchNorm with a momentum does not use
            unused.append(label)
    if reordered := [labels[name] for name in flattened if name in labels]:
        log.info("%s: the inputs of %s are reordered from [c, h, w] to [h, w, c]", path, ", ".join(reordered))
    if isinstance(backbone, ResNet):  # the names and shapes of timm's variants are the same
        log.info("%s: assuming torchvision's ResNet, with the stride in the 3x3 convolutions and without the blur "
                 "pooling of timm's resnetblur", path)  # fmt: skip
    return Weights({"sha256": sha256}, metadata, named, labels, unused)


def _fit(weights: Weights, own: Mapping[str, jax.ShapeDtypeStruct], grid: Grid | None) -> None:
    """Sorts the arrays that were found into the other fields, by comparing them with `own`, the model's variables."""
    arrays, labels, left_out = weights.found, weights.labels, set[str]()
    written = re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(weights.record.get("grid")))
    their_grid = (int(written[1]), int(written[2])) if written else None
    tokens = sum(re.split("[./]", label)[-1] in _TOKENS for label in (*labels.values(), *weights.unused))
    head = [name for name in own if name.startswith(_HEAD)]
    if any(name not in arrays or arrays[name].shape != own[name].shape for name in head):
        theirs, ours = [n for x in head if x in arrays for n in arrays[x].shape[-1:]], own[head[0]].shape[-1]
        weights.head = (
            "it has none" if not theirs
            else f"{theirs[0]} classes in it, {ours} here" if theirs[0] != ours
            else "another width, or a part"
        )  # fmt: skip
        weights.notes.append(f"a new head ({weights.head})")
    for name, array in arrays.items():
        if name not in own:
            if (module := _module_of(name)) == "backbone" or (module == "head" and head):
                weights.unused.append(labels[name])
            else:
                left_out.add(module)
            continue
        shape, dtype = own[name].shape, own[name].dtype
        if name in head and weights.head:
            continue
        if array.shape == shape and (not name.endswith(_POSITIONS) or their_grid in (None, grid)):
            if array.dtype.kind in "biuc" and array.dtype != dtype:
                raise UserError(f"init_from: {labels[name]} holds {array.dtype} and not floating-point numbers, as "
                                "quantized weights do; name the file that they were quantized from")  # fmt: skip
            weights.taken[name] = np.array(array, dtype)
        elif grid and name.endswith(_POSITIONS) and (
            fitted := _resize_positions(array, shape, grid, tokens, their_grid)
        ):  # fmt: skip
            weights.taken[name], words = fitted
            weights.notes.append(f"positions resized ({words})")
        elif len(shape) == array.ndim == 4 and array.shape == (*shape[:2], 3, shape[3]) and shape[2] <= 4:
            rgb, channels = np.asarray(array, np.float32), shape[2]  # a stem's kernel, as timm's `adapt_input_conv`
            repeated = rgb[:, :, np.arange(channels) % 3] * np.float32(3 / channels)
            weights.taken[name] = rgb.sum(2, keepdims=True) if channels == 1 else repeated
            weights.notes.append(f"stem adapted (3 channels to {channels})")
        else:
            weights.misfits.append(f"{labels[name]}: {list(array.shape)} in it, {list(shape)} here")
    random = [name for name in own if name not in arrays and name not in head]
    weights.missing = [name for name in random if _module_of(name) == "backbone"]
    fresh = {_module_of(name) for name in random} - {"backbone"}
    for text, modules in (("left out", left_out), ("from random weights", fresh)):
        weights.notes += [f"{text}: {', '.join(sorted(modules))}"] if modules else []


def patch_grid(programs: Programs) -> Grid | None:
    """The patch grid (rows, columns) of the model; None for a model without patches."""
    patch = getattr(programs.recipe.plain_model.backbone, "patch", None)
    h, w, _ = programs.recipe.data.image_shape
    return (h // patch, w // patch) if isinstance(patch, int) else None


def _check_whole(programs: Programs, weights: Weights, what: str) -> None:
    """Raises UserError if the weights lack a part of the model, or if their record says they predict otherwise."""
    config, here, record = programs.recipe.config, programs.recipe.data.class_names, weights.record
    if weights.head or weights.missing or weights.misfits:
        lacking = f"the head ({weights.head})" if weights.head else _some(weights.missing + weights.misfits)
        raise UserError(f"{what} is not a complete model: it lacks {lacking}; train it on these data first")
    instead = f", or pass --workdir={config.init_from} instead" if "step" in weights.source else ""
    if (theirs := record.get("class_names", "")) not in ("", one_per_line(here)):
        raise UserError(f"{what} has the classes {theirs.split('\n')[:5]}…, and data.source={config.data.source!r} has "
                        f"{list(here)[:5]}…: its predictions would have wrong names; name the source of its classes"
                        f"{instead}")  # fmt: skip
    for key, meaning in (("augment", ops.evaluation_spec), ("loss", losses.link_of), ("model", spec.parse)):
        text = record.get(key, config[key])
        if text != config[key] and (spec.names_code(text) or meaning(text) != meaning(config[key])):
            raise UserError(f"{what} was trained with {key}={text!r}, and this command has {key}={config[key]!r}: its "
                            f"predictions would be wrong; give both the same{instead}")  # fmt: skip


def _check_published(programs: Programs, published: Published, what: str) -> None:
    """Names a licence that forbids uses, and raises UserError if `augment` normalizes otherwise than the network."""
    if published.license:
        log.warning("%s: the licence of these weights, %s, forbids some uses", what, published.license)
    config, op = programs.recipe.config, initial.normalize(published, programs.recipe.data.image_shape[-1])
    same = all(map(functools.partial(np.allclose, atol=1e-3), *map(ops.normalization, (config.augment, op))))
    if config.init_strict and not same:
        raise UserError(f"{what} needs {op}, and this config has augment={config.augment!r}; drop normalize there, or "
                        "set init_strict=False")  # fmt: skip


def _resize_positions(
    array: np.ndarray, shape: tuple[int, ...], grid: Grid, tokens: int, theirs: Grid | None
) -> tuple[np.ndarray, str] | None:
    """Resizes position embeddings [1, tokens + rows * columns, d] of the grid `theirs`, by default a square.

    The result has the `shape` [1, own tokens + rows * columns, d] for `grid`. Bicubic with antialiasing, as in timm
    (Keys's kernel with a = -0.5); DINOv2's table, that of 37 by 37 patches and a class token, as its authors do. The
    embeddings of `tokens`, which come first, are unchanged. Returns None if the widths or the numbers differ, or if the
    file lacks a token that the model needs.
    """
    if array.ndim != 3 or array.shape[1] <= tokens:
        return None
    own_tokens, d = shape[1] - math.prod(grid), shape[2]
    if own_tokens == 0 and (math.prod(theirs) if theirs else math.isqrt(array.shape[1]) ** 2) == array.shape[1]:
        tokens = 0  # the file's have no positions
    side = math.isqrt(array.shape[1] - tokens)
    rows, columns = theirs or (side, side)
    if tokens + rows * columns != array.shape[1] or array.shape[::2] != shape[::2] or own_tokens not in (0, tokens):
        return None
    table = np.array(array, np.float32)
    own = table[0, tokens:].reshape(rows, columns, d)
    if (rows, columns, tokens) == (37, 37, 1):
        own = np.einsum("hi,wj,ijd->hwd", *map(_dinov2_weights, grid), own, optimize=True).astype(np.float32)
    else:
        own = np.asarray(jax.image.resize(own, (*grid, d), "cubic", antialias=True))
    resized = np.concatenate([table[:, :own_tokens], own.reshape(1, -1, d)], 1)
    return resized, f"{rows}x{columns} to {grid[0]}x{grid[1]}"


def _dinov2_weights(new: int) -> np.ndarray:
    """The matrix f64[new, 37] of DINOv2's resizing: bicubic with a = -0.75, as if to new + 0.1, not antialiased."""
    at = (np.arange(new)[:, None] + 0.5) * 37 / (new + 0.1) - 0.5
    taps = np.floor(at).astype(int) + np.arange(-1, 3)
    x, out = np.abs(at - taps), np.zeros((new, 37))
    cubic = np.where(x <= 1, (1.25 * x - 2.25) * x * x + 1, -0.75 * (((x - 5) * x + 8) * x - 4))
    np.add.at(out, (np.arange(new)[:, None], np.clip(taps, 0, 36)), cubic)
    return out


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
