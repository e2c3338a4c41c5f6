"""Helpers to read jaxprs and evaluate them equation by equation."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jax.typing import ArrayLike

type Atom = Var | Literal  # an operand of an equation

# Calls to inline after differentiation, which has used their custom derivatives: the parameter with their jaxpr.
INLINED: Mapping[str, str] = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
}  # fmt: skip


def bind(
    equation: JaxprEqn, operands: Sequence[ArrayLike], params: Mapping[str, object] | None = None
) -> list[jax.Array]:
    """Applies an equation's primitive to other operands, and with other parameters `params` if not None."""
    out = equation.primitive.bind(*operands, **(equation.params if params is None else params))
    return list(out) if equation.primitive.multiple_results else [out]


def aval_of(atom: Atom) -> jax.core.ShapedArray:
    """The shape and dtype of an array in a jaxpr."""
    aval: Any = atom.aval  # not a ShapedArray for random keys, but it has `shape` and `dtype` too
    shaped: jax.core.ShapedArray = aval
    return shaped


def inner(equation: JaxprEqn) -> list[Jaxpr | ClosedJaxpr]:
    """The jaxprs inside an equation, closed or not: the body of a loop, the branches of a conditional."""
    parameters = equation.params.values()
    values = [v for value in parameters for v in (value if isinstance(value, tuple | list) else (value,))]
    return [v for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")]


def holds(jaxpr: Jaxpr | ClosedJaxpr, primitive: str) -> bool:
    """Whether a jaxpr, or one inside it such as the body of a loop, contains this primitive."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # unwrap a ClosedJaxpr
    return any(
        equation.primitive.name == primitive or any(holds(one, primitive) for one in inner(equation))
        for equation in jaxpr.eqns
    )
