"""Decides which bfloat16 values of a program the CPU layout pass rounds, and which stay in float32 between layers.

A rounding is omitted for all readers of a value or for none, so that no two readers see different numbers: with
`m = max(h)`, some `h == m` holds and `m - h` is never negative. The maximum of an array, a slice or a transpose is
rounded if the array is, since rounding is monotonic and commutes with copying.

Matmul operands and the program's results are rounded. Discontinuous operations (comparisons, `argmax`, `floor`, casts
to integers, unknown primitives) read exactly the program's values: no rounding is omitted on the way to them, back to
the last matmul, sum or float32 arithmetic.
"""

import functools
import operator
from dataclasses import dataclass

import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from imgclf_jax.core.jaxprs import INLINED, MATMULS, Atom, aval_of

# What the readers of a value need, as bits: that it is rounded, and that it is computed from exact values.
FREE, ROUNDED, FROM_EXACT, EXACT = range(4)

# Operations that return elements of their operands, or negatives of them: rounding commutes with them.
COPIES = frozenset(
    """abs broadcast_in_dim clamp concatenate copy copy_p max min neg pad reduce_max reduce_min reshape rev select_n
    slice squeeze stop_gradient transpose""".split()  # noqa: SIM905
)
# Operations that are continuous on their domain, and defined for a number if they are for that number rounded.
_CONTINUOUS = frozenset(
    """add add_any asinh atan cbrt cos cosh div erf erfc exp exp2 expm1 integer_pow log logistic mul rsqrt sin sinh sqrt
    square sub tan tanh""".split()  # noqa: SIM905
)
_COMPARISONS = frozenset("eq ge gt le lt ne".split())  # noqa: SIM905
_FLOATS = frozenset([jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)])
_SUMS = frozenset(["reduce_sum", "reduce_prod"])  # continuous, and their accumulation order is free


@dataclass(frozen=True)
class Needs:
    """What the readers of each variable of a jaxpr need (absent: FREE), and the same for each inlined call."""

    values: dict[Var, int]
    calls: dict[int, "Needs"]  # by equation number


def needs(jaxpr: Jaxpr, results: list[int]) -> Needs:
    """Propagates the needs of the results of a jaxpr backwards to all its variables."""
    found = Needs({}, {})

    def add(atom: Atom, need: int) -> None:
        if need and not isinstance(atom, Literal):
            found.values[atom] = found.values.get(atom, FREE) | need

    for atom, need in zip(jaxpr.outvars, results, strict=True):
        add(atom, need)
    for number, eqn in reversed([*enumerate(jaxpr.eqns)]):
        result_needs = [found.values.get(v, FREE) for v in eqn.outvars]
        if eqn.primitive.name in INLINED:
            body = eqn.params[INLINED[eqn.primitive.name]].jaxpr
            found.calls[number] = inner = needs(body, result_needs)
            operand_needs = [inner.values.get(v, FREE) for v in body.invars]
        else:
            any_need = functools.reduce(operator.or_, result_needs, FREE)
            operand_needs = [_operand_need(eqn, v, any_need) for v in eqn.invars]
        for atom, need in zip(eqn.invars, operand_needs, strict=True):
            add(atom, need)
    return found


def _operand_need(eqn: JaxprEqn, operand: Atom, result: int) -> int:
    """What an operation needs of an operand, given the need `result` of its results."""
    name, is_bfloat16 = eqn.primitive.name, aval_of(operand).dtype == jnp.bfloat16
    if name in COPIES:
        return result
    if name == "convert_element_type" and {aval_of(operand).dtype, eqn.params["new_dtype"]} <= _FLOATS:
        return result
    if name in _CONTINUOUS:
        return EXACT if result & FROM_EXACT and is_bfloat16 else FREE
    if name in _SUMS:
        return FREE
    if name == "optimization_barrier" or (name == "sort" and len(eqn.outvars) == 1):  # copies that run in bfloat16
        return result | ROUNDED if is_bfloat16 else result
    if name.startswith("cpu_") or name in MATMULS:  # or of `multilinear.py`
        return ROUNDED if is_bfloat16 else FREE
    if reads_sign(eqn):
        return FROM_EXACT
    return EXACT


def reads_sign(eqn: JaxprEqn) -> bool:
    """Whether an operation reads only signs, as the gradient of ReLU does; rounding keeps them."""
    is_zero = [isinstance(v, Literal) and v.val == 0 for v in eqn.invars]
    return eqn.primitive.name == "sign" or (eqn.primitive.name in _COMPARISONS and any(is_zero))
