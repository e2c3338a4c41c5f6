"""Counts of a program: FLOPs of a jaxpr; memory traffic, collectives and sizes of a compiled program."""

import math
from dataclasses import dataclass

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from imgclf_jax.core import jaxprs
from imgclf_jax.core.jaxprs import aval_of
from imgclf_jax.core.typing import PyTree
from imgclf_jax.tools.dryrun import traffic


def matmul_flops(jaxpr: Jaxpr | ClosedJaxpr) -> float:
    """Counts the FLOPs of matmuls and convolutions, two per multiply-add; loops of unknown length count once.

    Fused attention kernels count as their matmuls.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0.0
    for equation in jaxpr.eqns:
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
            products = 5 if "bwd" in name else 2
            total += products * 2 * b * heads * queries * keys * width
        else:
            inner = [matmul_flops(jaxpr) for jaxpr in jaxprs.inner(equation)]
            times = params.get("length", 1) if name == "scan" else 1
            if name == "shard_map":  # the body describes one shard
                split = {axis for spec in params["in_specs"] for axis in jax.tree.leaves(tuple(spec))}
                times = math.prod(params["mesh"].shape[axis] for axis in split)
            total += (max(inner, default=0) if name == "cond" else sum(inner)) * times
    return total


@dataclass(frozen=True)
class Counts:
    """Counts of one step on one device."""

    bytes: float  # read from and written to the device's memory, after fusion
    collectives: dict[str, tuple[int, int]]  # kind → (count, bytes of the results)


def count_program(compiled: jax.stages.Compiled) -> Counts:
    """Counts a compiled program (see `traffic`): one step, with all microbatches of gradient accumulation."""
    module = traffic.Module(compiled.as_text() or "")
    return Counts(float(module.traffic()), module.collectives())


def bytes_per_device(tree: PyTree) -> int:
    """Returns the bytes per device of a pytree of arrays or `ShapeDtypeStruct` with shardings."""
    total = 0
    for x in jax.tree.leaves(tree):
        shape = x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) is not None else x.shape
        total += math.prod(shape) * x.dtype.itemsize
    return total
