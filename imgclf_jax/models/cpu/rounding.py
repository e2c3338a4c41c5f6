"""Decides which bfloat16 values of a program are rounded, as it says, and which stay in float32 between two layers.

A rounding is left out for all readers of a value or for none, so that no two of them see different numbers: `h == m` of
`m = max(h)` holds where the program says so, and `m - h` is never negative. The maximum of an array, a slice of it or
its transpose is rounded if the array is, since rounding is monotonic and commutes with copying.

Matmuls read rounded values, and so does all that leaves the program. Whatever is discontinuous (comparisons, `argmax`,
`floor`, casts to integers, any operation that is not known here) reads exactly the program's values: in what leads to
them, up to the last matmul, sum or float32 arithmetic, no rounding is left out.
"""

import functools
import operator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal

from imgclf_jax.core.jaxprs import INLINED

# What is needed of a value, bits: that it is rounded, and that it is computed of exact values.
FREE, ROUNDED, OF_EXACT, EXACT = range(4)

# What gives elements of its operands, or their negatives: to round before it is to round after it.
COPIES = frozenset(
    """abs broadcast_in_dim clamp concatenate copy copy_p max min neg pad reduce_max reduce_min reshape rev select_n
    slice squeeze stop_gradient transpose""".split()  # noqa: SIM905
)
# What is continuous wherever it is defined, and defined for a number if it is for the same number rounded.
_CONTINUOUS = frozenset(
    """add add_any asinh atan cbrt cos cosh div erf erfc exp exp2 expm1 integer_pow log logistic mul rsqrt sin sinh sqrt
    square sub tan tanh""".split()  # noqa: SIM905
)
_COMPARISONS = frozenset("eq ge gt le lt ne".split())  # noqa: SIM905
_FLOATS = frozenset([jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)])
_SUMS = frozenset(["reduce_sum", "reduce_prod"])  # continuous, and rounded in an order of their own
_MATMULS = frozenset(["conv_general_dilated", "dot_general"])  # and those of `multilinear.py`; of arrays in bfloat16


@dataclass(frozen=True)
class Needs:
    """What is needed of each variable of a jaxpr, FREE if it is not there, and of those in the calls it makes."""

    of: dict[Any, int]
    calls: dict[int, "Needs"]  # by the number of their equation


def needs(jaxpr: Any, results: list[int]) -> Needs:
    """What the readers of each value need, for a jaxpr of whose results so much is needed."""
    found = Needs({}, {})

    def add(atom: Any, need: int) -> None:
        if need and not isinstance(atom, Literal):
            found.of[atom] = found.of.get(atom, FREE) | need

    for atom, need in zip(jaxpr.outvars, results, strict=True):
        add(atom, need)
    for number, eqn in reversed([*enumerate(jaxpr.eqns)]):
        of_results = [found.of.get(v, FREE) for v in eqn.outvars]
        of_any = functools.reduce(operator.or_, of_results, FREE)
        if eqn.primitive.name in INLINED:
            body = eqn.params[INLINED[eqn.primitive.name]].jaxpr
            found.calls[number] = inner = needs(body, of_results)
            of_operands = [inner.of.get(v, FREE) for v in body.invars]
        else:
            of_operands = [_reads(eqn, v, of_any) for v in eqn.invars]
        for atom, need in zip(eqn.invars, of_operands, strict=True):
            add(atom, need)
    return found


def _reads(eqn: Any, operand: Any, result: int) -> int:
    """What an operation needs of an operand, if so much is needed of its results."""
    name, low = eqn.primitive.name, operand.aval.dtype == jnp.bfloat16
    if name in COPIES:
        return result
    if name == "convert_element_type" and {operand.aval.dtype, eqn.params["new_dtype"]} <= _FLOATS:
        return result
    if name in _CONTINUOUS:
        return EXACT if result & OF_EXACT and low else FREE
    if name in _SUMS:
        return FREE
    if name == "optimization_barrier" or (name == "sort" and len(eqn.outvars) == 1):  # copies, of arrays in bfloat16
        return result | ROUNDED if low else result
    if name.startswith("cpu_") or name in _MATMULS:
        return ROUNDED if low else FREE
    if reads_sign(eqn):
        return OF_EXACT
    return EXACT


def reads_sign(eqn: Any) -> bool:
    """Whether an operation reads signs alone, as the gradient of ReLU does: rounding changes none."""
    is_zero = [isinstance(v, Literal) and v.val == 0 for v in eqn.invars]
    return eqn.primitive.name == "sign" or (eqn.primitive.name in _COMPARISONS and any(is_zero))
