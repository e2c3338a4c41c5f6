"""Helpers to read jaxprs."""

import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

type Atom = Var | Literal  # an operand of an equation


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


def matmul_flops(jaxpr: Jaxpr | ClosedJaxpr) -> float:
    """Counts the FLOPs of matmuls and convolutions.

    A multiply-add counts two, a loop of unknown length once, a fused attention kernel as its matmuls.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            lhs, out = aval_of(equation.invars[0]), aval_of(equation.outvars[0])
            total += 2 * out.size * math.prod(lhs.shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            numbers = params["dimension_numbers"]
            kernel, out = aval_of(equation.invars[1]), aval_of(equation.outvars[0])
            taps = math.prod(kernel.shape[i] for i in numbers.rhs_spec[1:])  # input features and positions
            spread = math.prod(params["lhs_dilation"])  # zeros between inputs are free
            total += 2 * out.size * taps / (spread * params["batch_group_count"])
        elif name.startswith("dot_product_attention"):
            b, queries, heads, width = aval_of(equation.invars[0]).shape
            keys = aval_of(equation.invars[1]).shape[1]
            matmuls = 5 if "bwd" in name else 2
            total += matmuls * 2 * b * heads * queries * keys * width
        else:
            bodies = [matmul_flops(one) for one in inner(equation)]
            times = params.get("length", 1) if name == "scan" else 1
            if name == "shard_map":  # the body describes one shard
                split = {axis for spec in params["in_specs"] for axis in jax.tree.leaves(tuple(spec))}
                times = math.prod(params["mesh"].shape[axis] for axis in split)
            total += times * (max(bodies, default=0.0) if name == "cond" else sum(bodies))
    return total
