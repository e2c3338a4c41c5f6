"""Helpers to read jaxprs."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from imgclf_jax.core import platform, rng


def inner(equation: JaxprEqn) -> list[Jaxpr | ClosedJaxpr]:
    """The jaxprs inside an equation, closed or not: the body of a loop, the branches of a conditional."""
    values = [v for one in equation.params.values() for v in (one if isinstance(one, tuple | list) else (one,))]
    return [v for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")]


def walk(jaxpr: Jaxpr | ClosedJaxpr) -> Iterator[Jaxpr | ClosedJaxpr]:
    """Yields `jaxpr` and all jaxprs inside it, each before those inside itself."""
    yield jaxpr
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        for one in inner(equation):
            yield from walk(one)


def matmul_flops(jaxpr: Jaxpr | ClosedJaxpr) -> float:
    """Counts the FLOPs of matmuls and convolutions.

    A multiply-add counts two, a loop of unknown length once, a fused attention kernel as its matmuls.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        shapes: list[Any] = [getattr(atom.aval, "shape", ()) for atom in equation.invars]
        outputs = math.prod(getattr(equation.outvars[0].aval, "shape", ())) if equation.outvars else 0
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += 2 * outputs * math.prod(shapes[0][i] for i in contracted)
        elif name == "conv_general_dilated":
            numbers = params["dimension_numbers"]
            taps = math.prod(shapes[1][i] for i in numbers.rhs_spec[1:])  # features and positions
            spread = math.prod(params["lhs_dilation"])  # zeros between inputs are free
            total += 2 * outputs * taps / (spread * params["batch_group_count"])
        elif name.startswith("dot_product_attention"):
            b, queries, heads, width = shapes[0]
            matmuls = 5 if "bwd" in name else 2
            total += matmuls * 2 * b * heads * queries * shapes[1][1] * width
        else:
            bodies = [matmul_flops(one) for one in inner(equation)]
            times = params.get("length", 1) if name == "scan" else 1
            total += times * (max(bodies, default=0.0) if name == "cond" else sum(bodies))
    return total


def forward(model: nn.Module, image_shape: tuple[int, int, int]) -> ClosedJaxpr:
    """The forward pass of one image, with layers that are plain matmuls and convolutions."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with platform.tracing_for("gpu"):
        init = jax.make_jaxpr(lambda x: model.init_with_output(rng.init_streams(jax.random.key(0)), x, train=False))
        return init(images)
