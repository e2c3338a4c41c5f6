"""Evaluates a jaxpr in NumPy, one operation after another, each result rounded to its dtype.

XLA compiles bfloat16 programs for CPU with fewer roundings than they say.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

ELEMENTWISE = {
    **{f.__name__: f for f in (
        np.cbrt, np.ceil, np.cos, np.cosh, np.exp, np.expm1, np.floor, np.log, np.log1p, np.sign, np.sin, np.sinh,
        np.sqrt, np.square, np.tan, np.tanh)},
    "abs": np.abs, "add": np.add, "add_any": np.add, "and": np.bitwise_and, "copy": np.array, "copy_p": np.array,
    "eq": np.equal, "ge": np.greater_equal, "gt": np.greater, "is_finite": np.isfinite, "le": np.less_equal,
    "lt": np.less, "max": np.maximum, "min": np.minimum, "mul": np.multiply, "ne": np.not_equal, "neg": np.negative,
    "not": np.invert, "optimization_barrier": lambda *xs: xs, "or": np.bitwise_or, "rem": np.fmod, "sub": np.subtract,
    "xor": np.bitwise_xor, "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "select_n": lambda which, *cases: np.choose(which.astype(np.intp), cases),
}  # fmt: skip
MOVES = {
    "transpose": lambda x, p: x.transpose(p["permutation"]),
    "reshape": lambda x, p: x.reshape(p["new_sizes"]),
    "squeeze": lambda x, p: x.squeeze(p["dimensions"]),
    "rev": lambda x, p: np.flip(x, p["dimensions"]),
    "slice": lambda x, p: x[tuple(map(slice, p["start_indices"], p["limit_indices"], p["strides"] or [1] * x.ndim))],
    "convert_element_type": lambda x, p: x.astype(p["new_dtype"]),
    "broadcast_in_dim": lambda x, p: np.broadcast_to(
        x.reshape([x.shape[p["broadcast_dimensions"].index(i)] if i in p["broadcast_dimensions"] else 1
                   for i in range(len(p["shape"]))]), p["shape"]),
    "reduce_max": lambda x, p: x.max(p["axes"]), "reduce_min": lambda x, p: x.min(p["axes"]),
    "reduce_and": lambda x, p: x.all(p["axes"]), "reduce_or": lambda x, p: x.any(p["axes"]),
    "argmax": lambda x, p: x.argmax(*p["axes"]).astype(p["index_dtype"]),
    "argmin": lambda x, p: x.argmin(*p["axes"]).astype(p["index_dtype"]),
}  # fmt: skip


def evaluate(closed, *args):
    """(The results of a closed jaxpr, the largest absolute value of everything it computes)."""
    greatest = [1.0]
    with np.errstate(all="ignore"):
        return _evaluate(closed.jaxpr, closed.consts, args, greatest), greatest[0]


def _evaluate(jaxpr, consts, args, greatest):
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def value(atom):
        if isinstance(atom, Literal):
            return np.asarray(atom.val, atom.aval.dtype)
        x = values[atom]
        return x if jnp.issubdtype(x.dtype, jax.dtypes.extended) else np.asarray(x)

    for eqn in jaxpr.eqns:
        out = _apply(eqn.primitive, [value(v) for v in eqn.invars], eqn.params, greatest)
        for v, x in zip(eqn.outvars, out, strict=True):
            values[v] = x = x if hasattr(x, "dtype") and x.dtype == v.aval.dtype else np.asarray(x, v.aval.dtype)
            if jnp.issubdtype(x.dtype, np.floating) and x.size:
                greatest[0] = max(greatest[0], float(np.nanmax(np.abs(np.where(np.isfinite(x), x, 0)))))
    return [value(v) for v in jaxpr.outvars]


def _apply(primitive, args, p, greatest):
    name = primitive.name
    run = functools.partial(_run, greatest=greatest)
    if name in ELEMENTWISE:
        out = ELEMENTWISE[name](*args)
        return list(out) if primitive.multiple_results else [out]
    if name in MOVES:
        return [MOVES[name](*args, p)]
    if name == "div" and jnp.issubdtype(args[0].dtype, np.floating):
        return [np.divide(*args)]
    if name == "concatenate":
        return [np.concatenate(args, p["dimension"])]
    if name == "reduce_sum":
        wide = np.float32 if args[0].dtype == jnp.bfloat16 else args[0].dtype
        return [args[0].sum(p["axes"], dtype=wide)]
    if name == "cond":
        return run(p["branches"][int(np.clip(args[0], 0, len(p["branches"]) - 1))], *args[1:])
    if name == "while":
        first, last = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        state = args[last:]
        while run(p["cond_jaxpr"], *args[:first], *state)[0]:
            state = run(p["body_jaxpr"], *args[first:last], *state)
        return state
    body = None if name == "scan" else p.get("call_jaxpr", p.get("jaxpr"))
    if body is not None:
        return run(body, *args)
    out = primitive.bind(*map(jnp.asarray, args), **p)
    return list(out) if primitive.multiple_results else [out]


def _run(jaxpr, *args, greatest):
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return _evaluate(inner, getattr(jaxpr, "consts", ()), args, greatest)
