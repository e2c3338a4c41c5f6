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

from imgclf_jax.core.jaxprs import INLINED, bind
from imgclf_jax.models.cpu.moves import MOVES
from imgclf_jax.models.cpu.placed import (
    LEFT_OUT,
    Placed,
    Spread,
    arranged,
    is_low,
    natural,
    of_dtype,
    of_order,
    rounding_of,
    whole,
)
from imgclf_jax.models.cpu.rounding import COPIES, EXACT, FREE, ROUNDED, Needs, needs, reads_sign

_ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp clz copy copy_p cos cosh digamma div
    eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma log log1p logistic lt max min mul ne
    neg not or pow rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt
    square stop_gradient sub tan tanh xor""".split()  # noqa: SIM905
)
_BODIES = ("scan", "while", "cond", "checkpoint", "remat", "remat2")  # each is rewritten by itself


def rewrite(function: Callable[..., Any], need: int = ROUNDED) -> Callable[..., Any]:
    """`function` of pytrees of arrays, with the same results and with as few transposes and roundings as can be.

    `need`, of `rounding.py`, is what the readers of its results need.
    """

    @functools.wraps(function)
    def rewritten(*args: Any) -> Any:
        jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        read = needs(jaxpr.jaxpr, [need] * len(jaxpr.jaxpr.outvars))
        out = [whole(x) for x in _evaluate(jaxpr, jax.tree.leaves(args), read)]
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return rewritten


def _evaluate(closed: Any, args: Sequence[Any], read: Needs) -> list[Any]:
    """The results of a closed jaxpr: arrays, `Placed` or `Spread`, as `args` are. `read` is what its readers need."""
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for number, eqn in enumerate(jaxpr.eqns):
        scope = str(eqn.source_info.name_stack)  # what a profile shows
        with eqn.ctx.manager, jax.named_scope(scope) if scope else contextlib.nullcontext():
            found = _apply(eqn, [value(atom) for atom in eqn.invars], read.calls.get(number))
        for variable, x in zip(eqn.outvars, found, strict=True):
            values[variable] = x
            if isinstance(x, Placed) and read.of.get(variable, FREE) & ROUNDED:
                x.round()
    return [value(atom) for atom in jaxpr.outvars]


def _apply(eqn: Any, args: list[Any], read: Needs | None) -> list[Any]:
    name = eqn.primitive.name
    if read is not None:
        return _evaluate(eqn.params[INLINED[name]], args, read)
    if name in _BODIES:
        return bind(eqn, [whole(x) for x in args], {k: _body(v) for k, v in eqn.params.items()})
    if name == "convert_element_type":
        return [_converted(eqn, args[0])]
    if name in _ELEMENTWISE:
        return _elementwise(eqn, args)
    moved = MOVES[name](eqn, args, bind) if name in MOVES else None
    if moved is not None:
        return moved
    if rounding_of(args):
        return bind(eqn, [whole(x) for x in args])
    out = bind(eqn, [arranged(x, natural(np.ndim(x))) for x in args])
    return [of_dtype(y, natural(y.ndim), v.aval.dtype) for y, v in zip(out, eqn.outvars, strict=True)]


def _body(param: Any) -> Any:
    """A jaxpr, rewritten; of several each; anything else as it is."""
    if isinstance(param, tuple) and param and hasattr(param[0], "eqns"):
        return tuple(_body(x) for x in param)
    if not hasattr(param, "eqns"):
        return param
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in param.in_avals]
    return jax.make_jaxpr(rewrite(jaxpr_as_fun(param), EXACT))(*shapes)


def _converted(eqn: Any, x: Any) -> Any:
    new = eqn.params["new_dtype"]
    if new == jnp.bfloat16 and x.dtype == jnp.float32:
        array, order = (x.array, x.order) if isinstance(x, Placed) else (whole(x), natural(np.ndim(x)))
        return of_dtype(jnp.asarray(array), order, new)
    if is_low(x) and new == jnp.float32 and isinstance(x, Placed):
        return of_order(x.wide, x.order)
    return _elementwise(eqn, [x])[0]


def _elementwise(eqn: Any, args: list[Any]) -> list[Any]:
    """In the order of the greatest operand, one that is turned before one that is not; of bfloat16 in float32."""
    if not any(isinstance(x, Placed) or is_low(x) for x in args):
        return bind(eqn, [whole(x) for x in args])
    ndim = max(np.ndim(x) for x in args)
    lying = [x for x in args if np.ndim(x) == ndim and not isinstance(x, Spread)]
    orders = [(np.size(x), x.order if isinstance(x, Placed) else natural(ndim)) for x in lying] or [(0, natural(ndim))]
    _, order = max(orders, key=lambda pair: (pair[0], pair[1] != tuple(sorted(pair[1]))))
    copied = rounding_of(args) if eqn.primitive.name in COPIES or reads_sign(eqn) else LEFT_OUT
    operands = [arranged(x, order, copied) for x in args]
    params = eqn.params
    if "new_dtype" in params and params["new_dtype"] == jnp.bfloat16:  # of integers
        params = {**params, "new_dtype": np.dtype(np.float32)}
    out = bind(eqn, operands, params)
    return [of_dtype(y, order, v.aval.dtype, copied) for y, v in zip(out, eqn.outvars, strict=True)]
