"""The methods, gradient functions and attacks that ship, by their names in `method`, `gradient` and `--attack`."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from imgclf_jax.config import KEYS
from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.methods import Method, Problem
from imgclf_jax.methods.distill import distill
from imgclf_jax.methods.fixmatch import fixmatch
from imgclf_jax.methods.gradients import Gradient, GradientFunction
from imgclf_jax.methods.lora import lora
from imgclf_jax.methods.mean_teacher import mean_teacher
from imgclf_jax.methods.pgd import Attack, attack, pgd
from imgclf_jax.methods.sam import asam, sam
from imgclf_jax.methods.simclr import simclr
from imgclf_jax.methods.supcon import supcon
from imgclf_jax.methods.supervised import supervised

METHODS: dict[str, Callable[..., Method]] = {
    "distill": distill,
    "fixmatch": fixmatch,
    "lora": lora,
    "mean_teacher": mean_teacher,
    "simclr": simclr,
    "supcon": supcon,
    "supervised": supervised,
}

GRADIENTS: dict[str, Callable[..., GradientFunction]] = {
    "asam": asam,
    "pgd": pgd,
    "sam": sam,
}

ATTACKS: dict[str, Attack] = {"pgd": attack}


def check_name(text: str) -> None:
    """Raises UserError for a spec that names no method, or whose arguments do not fit."""
    spec.bind(spec.parse_one(text), METHODS, "method", given=("problem",))


def build(text: str, problem: Problem) -> Method:
    """The method that a spec such as `distill('runs/teacher')` names. Call it outside of a trace.

    Raises UserError for a spec that names none, for arguments that do not fit, and for what is no `Method`.
    """
    method = spec.bind(spec.parse_one(text), METHODS, "method", given=("problem",))(problem)
    if not isinstance(method, Method):
        raise UserError(f"method={text!r} returns a {type(method).__name__}; return imgclf_jax.methods.Method(loss)")
    if not callable(method.loss):
        raise UserError(f"method={text!r}: its loss is a {type(method.loss).__name__}; pass a function "
                        "(model, batch, fixed) -> Loss")  # fmt: skip
    return method


def build_gradient(
    text: str, pixel_range: Callable[[], tuple[jax.Array, jax.Array]] | None = None
) -> Callable[[Gradient], Gradient]:
    """The composed functions of a spec such as `sam(rho=0.05)`; the empty text keeps the gradient.

    They are given `pixel_range` as an attribute of the gradient, see `Gradient`. Raises UserError for a spec that names
    nothing, or whose arguments do not fit.
    """
    functions = [spec.bind(call, GRADIENTS, "gradient", given=("gradient",)) for call in spec.parse(text)]

    def wrap(gradient: Gradient) -> Gradient:
        if pixel_range is not None:
            gradient = dataclasses.replace(gradient, pixel_range=pixel_range)
        return functools.reduce(lambda g, f: dataclasses.replace(g, function=f(g)), functions, gradient)

    return wrap


def build_attack(text: str) -> Attack:
    """The function (gradient, images, keys, low, high) that a spec such as `pgd(eps='8/255')` names, see `pgd.attack`.

    Raises UserError for a spec that names none, or whose arguments do not fit.
    """
    given = ("gradient", "images", "keys", "low", "high")
    return spec.bind(spec.parse_one(text), ATTACKS, "attack", given=given)


def is_supervised(text: str) -> bool:
    """Whether a spec names the default method, which reads images and their labels or targets alone."""
    return spec.parse_one(text).name == "supervised"


def check_keys(method: Method, config: ConfigDict, has_targets: bool) -> None:
    """Raises UserError for a key of the config that the method would not read: `mix`, `metrics`, `tta` or `loss`."""
    if config.mix and method.inputs and not method.mixes:
        raise UserError(f"mix={config.mix!r}: method={config.method!r} makes its own batches and does not mix them; "
                        "leave mix empty, or, in a method of your own, call problem.mix in `inputs` and return "
                        "Method(…, mixes=True)")  # fmt: skip
    if method.predicts:
        return
    for key in ("metrics", "tta"):
        if config[key]:
            raise UserError(f"{key}={config[key]!r}: method={config.method!r} trains no head, so there are no "
                            f"predictions to use it on; leave {key} empty")  # fmt: skip
    call = spec.parse_one(config.loss)
    if call.args or call.kwargs or not (has_targets or call.name == KEYS["loss"][0]):
        advice = "say what the targets are by its name alone" if has_targets else "leave it 'softmax'"
        raise UserError(f"loss={config.loss!r}: method={config.method!r} trains no head and has a loss of its own; "
                        f"{advice}")  # fmt: skip
