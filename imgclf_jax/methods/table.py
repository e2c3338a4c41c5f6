"""The methods that ship, by the names that the config key `method` uses."""

from collections.abc import Callable

from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.methods import Method, Problem
from imgclf_jax.methods.distill import distill
from imgclf_jax.methods.simclr import simclr
from imgclf_jax.methods.supcon import supcon
from imgclf_jax.methods.supervised import supervised

METHODS: dict[str, Callable[..., Method]] = {
    "distill": distill,
    "simclr": simclr,
    "supcon": supcon,
    "supervised": supervised,
}


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
