"""Weights to start from, made elsewhere or by another run: what of them fits the model, and a report of the rest."""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from imgclf_jax.core import sharding, tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.programs import Programs
from imgclf_jax.run.checkpoint import Checkpoints
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.weights import files, torch_names

log = logging.getLogger(__name__)

_HEAD, _POSITIONS = "params/head/", "/positions_embedding"


@dataclass
class Weights:
    """What `init_from` gives a model: arrays by the names that `step.init_state` takes, and a report on the others."""

    source: dict[str, Any]  # for the record: the path, its SHA-256 and, of a work directory, the step
    taken: dict[str, np.ndarray] = field(default_factory=dict)
    resized: list[str] = field(default_factory=list)  # position embeddings of another grid, among those taken
    head: str = ""  # why the head is a new one; empty where it is taken
    misfits: list[str] = field(default_factory=list)  # of another shape than the model's
    unused: list[str] = field(default_factory=list)  # in the file, by its own names, and not in the model
    missing: list[str] = field(default_factory=list)  # in the model and not in the file

    @property
    def faults(self) -> list[str]:
        """What of it does not fit, in words; a new head and resized positions are no faults."""
        kinds = (
            (self.misfits, "of another shape"),
            (self.missing, "of the model not in it"),
            (self.unused, "in it without a place in the model"),
        )
        return [f"{len(names)} arrays {text} ({_some(names)})" for names, text in kinds if names]

    def report(self) -> str:
        """One sentence: what was taken and what became of the rest."""
        parts = [f"{len(self.taken)} arrays taken", *self.faults]
        parts += [f"positions resized ({', '.join(self.resized)})"] if self.resized else []
        parts += [f"a new head ({self.head})"] if self.head else []
        return "; ".join(parts)


def load(programs: Programs, whole: bool = False) -> Weights:
    """The weights of `config.init_from` for the model of `programs`; logs the report.

    Position embeddings of another grid are resized; a head of another number of classes is left out, to begin anew.
    Raises UserError for a file or work directory that cannot be read, for any other difference unless
    `config.init_strict` is False, and, with `whole`, for a parameter that would stay random, the head's too.
    """
    config = programs.recipe.config
    path = Path(config.init_from).expanduser()
    state, replicas = programs.shape["state"], programs.recipe.num_seeds > 1
    shapes = {"params": state.params, **state.model_state}
    own = dict(tree.named_leaves(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[replicas:], x.dtype), shapes)))
    if path.is_dir():
        named, labels, source = _read_workdir(path, programs)
    elif path.is_file():
        named, labels, source = _read_file(path, programs, own)
    else:
        raise UserError(
            f"init_from={config.init_from!r}: there is no such file or work directory (working directory: {Path.cwd()})"
        )
    weights = Weights({"path": config.init_from, **source})
    _fit(weights, named, labels, own, _grid(programs))
    what = f"init_from={config.init_from!r}"
    if not any(not name.startswith(_HEAD) for name in weights.taken):
        raise UserError(f"{what}: nothing in it fits model={config.model!r}: {'; '.join(weights.faults)}")
    if config.init_strict and weights.faults:
        raise UserError(f"{what} does not fit model={config.model!r}: {'; '.join(weights.faults)}; name the model that "
                        "it was made for, or take what fits with init_strict=False")  # fmt: skip
    if whole and (weights.head or weights.missing or weights.misfits):
        lacking = f"the head ({weights.head})" if weights.head else _some(weights.missing + weights.misfits)
        raise UserError(f"{what} gives no whole model, it lacks {lacking}; train it on these data first")
    log.log(logging.WARNING if weights.faults else logging.INFO, "%s: %s", what, weights.report())
    return weights


Named = tuple[dict[str, np.ndarray], dict[str, str], dict[str, Any]]  # by our names, their own names, the source


def _read_workdir(path: Path, programs: Programs) -> Named:
    """The best checkpoint of a run, or its latest where none is kept as the best; of several seeds the first one's."""
    workdir = Workdir(path)
    try:
        config = json.loads(workdir.config.read_text())
        metric, num_seeds = config["checkpoint"]["best"], config.get("num_seeds", 1)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"init_from={str(path)!r}: this directory holds no run (no readable config.json)") from e
    if not workdir.checkpoints.is_dir():
        raise UserError(f"init_from={str(path)!r}: the run in it has no checkpoint yet")
    checkpoints = Checkpoints(workdir.checkpoints, best=metric, read_only=True)
    if not (steps := checkpoints.steps()):
        raise UserError(f"init_from={str(path)!r}: the run in it has no checkpoint yet")
    best = checkpoints.best_step()
    step = steps[-1] if best is None else best
    state = checkpoints.restore_any(step, sharding.replicated(programs.mesh))["state"]
    # What evaluation uses: the averages, (params, model_state), where the run kept any.
    params, model_state = state.get("ema") or (state["params"], state.get("model_state"))
    variables = jax.device_get({"params": params, **(model_state or {})})
    if num_seeds > 1:
        log.info("init_from=%r: of the %d seeds of the run in it, the first one's weights", str(path), num_seeds)
        variables = jax.tree.map(lambda x: x[0], variables)
    named = dict(tree.named_leaves(variables))
    return named, {name: name for name in named}, {"step": step, "sha256": tree.sha256(variables)}


def _read_file(path: Path, programs: Programs, own: Mapping[str, Any]) -> Named:
    found = files.read(path)
    named, labels = {}, {}
    for label, array in found.items():
        if label.endswith("num_batches_tracked"):  # a count that no average with a momentum needs
            continue
        name = torch_names.own_name(programs.recipe.model.backbone, label, own)
        if name is None or name in named:
            name = label  # which no parameter is called
        else:
            array = torch_names.own_layout(array, name, own[name].shape)
        named[name], labels[name] = array, label
    with path.open("rb") as file:
        return named, labels, {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _fit(
    weights: Weights, named: Mapping[str, np.ndarray], labels: Mapping[str, str], own: Mapping[str, Any],
    grid: tuple[int, int] | None,
) -> None:  # fmt: skip
    """Sorts `named` into `weights` by whether the model has such arrays, `own`, of such shapes."""
    head = [name for name in own if name.startswith(_HEAD)]
    if any(name not in named or named[name].shape != own[name].shape for name in head):
        theirs = [named[name].shape[-1] for name in head if name in named]
        ours = own[head[0]].shape[-1]
        weights.head = (
            "it holds none" if not theirs
            else f"{theirs[0]} classes in it, {ours} here" if theirs[0] != ours
            else "of another width"
        )  # fmt: skip
    for name, array in named.items():
        if name not in own:
            weights.unused.append(labels[name])
        elif name in head and weights.head:
            continue
        elif array.shape == own[name].shape:
            weights.taken[name] = np.array(array, own[name].dtype)
        elif name.endswith(_POSITIONS) and grid and (fitted := _resize_positions(array, own[name].shape, grid)):
            weights.taken[name], words = fitted
            weights.resized.append(words)
        else:
            weights.misfits.append(f"{labels[name]}: {list(array.shape)} in it, {list(own[name].shape)} here")
    weights.missing += [name for name in own if name not in named and name not in head]


def _grid(programs: Programs) -> tuple[int, int] | None:
    """(rows, columns) of the patches of an image; None for a model that has no patches."""
    patch = getattr(programs.recipe.model.backbone, "patch", None)
    h, w, _ = programs.recipe.data.image_shape
    return (h // patch, w // patch) if isinstance(patch, int) else None


def _resize_positions(
    array: np.ndarray, shape: tuple[int, ...], grid: tuple[int, int]
) -> tuple[np.ndarray, str] | None:
    """Position embeddings [1, tokens + n * n, d] for another grid, `shape` [1, tokens + rows * columns, d].

    Bicubic with antialiasing, as timm resizes them (Keys's kernel with a = -0.5). A class token's, which comes first,
    stays as it is. None where the widths differ or a token is lacking.
    """
    side = math.isqrt(array.shape[1]) if array.ndim == 3 else 0
    tokens, own_tokens = array.shape[1] - side**2, shape[1] - math.prod(grid)
    if not side or array.shape[2] != shape[2] or own_tokens not in (0, tokens):
        return None
    d = shape[2]
    table = np.array(array, np.float32)
    square = table[0, tokens:].reshape(side, side, d)
    resized = np.asarray(jax.image.resize(square, (*grid, d), "cubic", antialias=True)).reshape(1, -1, d)
    whole = np.concatenate([table[:, :own_tokens], resized], 1)
    return whole, f"{side}x{side} to {grid[0]}x{grid[1]}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
