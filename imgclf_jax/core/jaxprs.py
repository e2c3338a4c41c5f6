"""Jaxprs, as programs that are read or evaluated again, equation by equation."""

from collections.abc import Mapping, Sequence
from typing import Any

# Calls whose body becomes part of a program once it is differentiated, by the parameter that holds their jaxpr: the
# derivatives that they carry have been used by then.
INLINED: Mapping[str, str] = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
}  # fmt: skip


def bind(equation: Any, operands: Sequence[Any], params: Mapping[str, Any] | None = None) -> list[Any]:
    """The results of an equation's primitive for other operands, and for other parameters if some are given."""
    out = equation.primitive.bind(*operands, **(equation.params if params is None else params))
    return list(out) if equation.primitive.multiple_results else [out]


def inner(equation: Any) -> list[Any]:
    """The jaxprs inside of an equation, closed ones among them: a loop's body, the branches of a condition."""
    parameters = equation.params.values()
    values = [v for value in parameters for v in (value if isinstance(value, tuple | list) else (value,))]
    return [v for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")]


def holds(jaxpr: Any, primitive: str) -> bool:
    """Whether a jaxpr, or one inside of it, such as the body of a loop, holds this primitive."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # of a closed one
    return any(
        equation.primitive.name == primitive or any(holds(one, primitive) for one in inner(equation))
        for equation in jaxpr.eqns
    )
