"""The built-in methods, gradient transforms and attacks, built from `method`, `gradient` and `--attack`."""

import dataclasses
from collections.abc import Callable

import jax

from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.methods import Method, Problem, gradients
from imgclf_jax.methods.distill import distill
from imgclf_jax.methods.fixmatch import fixmatch
from imgclf_jax.methods.gradients import Gradient, GradientFunction, clip_per_example
from imgclf_jax.methods.lora import lora
from imgclf_jax.methods.mean_teacher import mean_teacher
from imgclf_jax.methods.pgd import Attack, attack, pgd
from imgclf_jax.methods.sam import asam, sam
from imgclf_jax.methods.simclr import simclr, supcon
from imgclf_jax.methods.supervised import supervised

METHODS: dict[str, Callable[..., Method]] = {
    f.__name__: f for f in (distill, fixmatch, lora, mean_teacher, simclr, supcon, supervised)
}
GRADIENTS: dict[str, Callable[..., GradientFunction]] = {f.__name__: f for f in (asam, clip_per_example, pgd, sam)}
ATTACKS: dict[str, Attack] = {"pgd": attack}


def build(text: str, problem: Problem) -> Method:
    """Builds a method from a spec such as `distill('runs/teacher')`. Call it outside of a trace.

    Raises UserError for an unknown name, for arguments that do not fit, and if the result is no `Method`.
    """
    method = spec.bind(spec.parse_one(text), METHODS, "method", leading=("problem",))(problem)
    if not isinstance(method, Method):
        raise UserError(f"method={text!r} returns a {type(method).__name__}; return imgclf_jax.methods.Method(loss)")
    return method


def build_gradient(
    text: str, pixel_range: Callable[[], tuple[jax.Array, jax.Array]] | None = None
) -> Callable[[Gradient], Gradient]:
    """Composes the gradient transforms of a spec such as `sam(rho=0.05)`; "" is the identity.

    `pixel_range` becomes an attribute of the `Gradient`. Raises UserError for an unknown name and unfit arguments.
    """
    calls = spec.parse(text)
    functions = [spec.bind(call, GRADIENTS, "gradient", leading=("gradient",)) for call in calls]

    def wrap(gradient: Gradient) -> Gradient:
        gradient = dataclasses.replace(gradient, pixel_range=pixel_range)
        for function, call, count in zip(functions, calls, spec.occurrences(calls), strict=True):
            gradient = gradients.transform(gradient, function, call.name, count)
        return gradient

    return wrap


def build_attack(text: str) -> Attack:
    """Builds an attack (gradient, images, keys, low, high) from a spec such as `pgd(eps='8/255')`; see `pgd.attack`.

    Raises UserError for an unknown name and for arguments that do not fit.
    """
    leading = ("gradient", "images", "keys", "low", "high")
    return spec.bind(spec.parse_one(text), ATTACKS, "attack", leading=leading)
