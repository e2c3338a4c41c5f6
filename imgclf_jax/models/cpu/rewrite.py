"""Rewrites a whole program for CPU: cancels the transposes and the roundings between its layers.

A model's arrays are [b, h, w, c] and [b, n, d]; on CPU a layer computes on [c, h, w, b] and [d, b, n], since there a
matrix product is near the machine's peak (`products.py` says why). So each layer transposes what it is given and what
it gives. `rewrite` carries a transpose past the element-wise operations, sums and slices that follow it, until it meets
the one that undoes it. It carries roundings to bfloat16 past element-wise operations as well, since CPUs compute these
in float32. A product still reads bfloat16: there the array is rounded.

An operation that is not known here gets its operands as the program says. So results change in two ways only: sums may
be rounded in another order, and some roundings are left out. `rewrite` is applied after differentiation, to a function
such as a train step.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxpr_as_fun

from imgclf_jax.models.cpu.moves import MOVES
from imgclf_jax.models.cpu.placed import Placed, Spread, arranged, is_low, of_dtype, of_order, whole

_ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp clz copy copy_p cos cosh digamma div
    eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma log log1p logistic lt max min mul ne
    neg not or pow rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt
    square stop_gradient sub tan tanh xor""".split()  # noqa: SIM905
)
# Calls whose body becomes part of the program; the derivatives that they carry have been used by now.
_INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr",
            "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}  # fmt: skip
_BODIES = ("scan", "while", "cond", "checkpoint", "remat", "remat2")  # each is rewritten by itself


def rewrite(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of pytrees of arrays, with the same results and with as few transposes and roundings as can be."""

    @functools.wraps(function)
    def rewritten(*args: Any) -> Any:
        jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        out = [whole(x) for x in _evaluate(jaxpr, jax.tree.leaves(args))]
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return rewritten


def _evaluate(closed: Any, args: Sequence[Any]) -> list[Any]:
    """The results of a closed jaxpr: arrays, `Placed` or `Spread`, as `args` are."""
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        scope = str(eqn.source_info.name_stack)  # what a profile shows
        with eqn.ctx.manager, jax.named_scope(scope) if scope else contextlib.nullcontext():
            found = _apply(eqn, [read(atom) for atom in eqn.invars])
        values.update(zip(eqn.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(eqn: Any, args: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    if name in _INLINED:
        return _evaluate(eqn.params[_INLINED[name]], args)
    if name in _BODIES:
        return _bind(eqn, [whole(x) for x in args], {k: _body(v) for k, v in eqn.params.items()})
    if name == "convert_element_type":
        return [_converted(eqn, args[0])]
    if name in _ELEMENTWISE:
        return _elementwise(eqn, args)
    moved = MOVES[name](eqn, args, _bind) if name in MOVES else None
    return _bind(eqn, [whole(x) for x in args]) if moved is None else moved


def _bind(eqn: Any, args: Sequence[Any], params: Any = None) -> list[Any]:
    out = eqn.primitive.bind(*args, **(eqn.params if params is None else params))
    return list(out) if eqn.primitive.multiple_results else [out]


def _body(param: Any) -> Any:
    """A jaxpr, rewritten; of several each; anything else as it is."""
    if isinstance(param, tuple) and param and hasattr(param[0], "eqns"):
        return tuple(_body(x) for x in param)
    if not hasattr(param, "eqns"):
        return param
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in param.in_avals]
    return jax.make_jaxpr(rewrite(jaxpr_as_fun(param)))(*shapes)


def _converted(eqn: Any, x: Any) -> Any:
    new = eqn.params["new_dtype"]
    if new == jnp.bfloat16 and x.dtype == jnp.float32 and np.ndim(x):
        array, order = (x.array, x.order) if isinstance(x, Placed) else (whole(x), tuple(range(x.ndim)))
        return of_dtype(array, order, new)
    if is_low(x) and new == jnp.float32 and isinstance(x, Placed):
        return of_order(x.wide, x.order)
    return _elementwise(eqn, [x])[0]


def _elementwise(eqn: Any, args: list[Any]) -> list[Any]:
    """In the order of the greatest operand, one that is turned before one that is not; of bfloat16 in float32."""
    if not any(isinstance(x, Placed) or is_low(x) for x in args):
        return _bind(eqn, [whole(x) for x in args])
    lying = [x for x in args if not isinstance(x, Spread)] or [args[0].whole]
    orders = [(np.size(x), x.order if isinstance(x, Placed) else tuple(range(np.ndim(x)))) for x in lying]
    _, order = max(orders, key=lambda pair: (pair[0], pair[1] != tuple(sorted(pair[1]))))
    operands = [arranged(x, order) for x in args]
    params = eqn.params
    if "new_dtype" in params and params["new_dtype"] == jnp.bfloat16:  # of integers
        params = {**params, "new_dtype": np.dtype(np.float32)}
    out = _bind(eqn, operands, params)
    return [of_dtype(y, order, v.aval.dtype) for y, v in zip(out, eqn.outvars, strict=True)]
