"""What a program does, counted: operations in a jaxpr; traffic, collectives and memory in what is compiled."""

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import jax
from jax._src.lib import xla_client

from imgclf_jax.core import platform

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4,
          "f64": 8, "s64": 8, "u64": 8}  # fmt: skip
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_CALL = re.compile(rf" ({'|'.join(_COLLECTIVES)})(?:-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def product_flops(jaxpr: Any) -> float:
    """Operations of all matrix products and convolutions, a multiply-add being two; loops of unknown length count once.

    Attention that a kernel of its own computes is counted as its products are.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            lhs, out = equation.invars[0].aval, equation.outvars[0].aval
            total += 2 * out.size * math.prod(lhs.shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            numbers = params["dimension_numbers"]
            kernel, out = equation.invars[1].aval, equation.outvars[0].aval
            taps = math.prod(kernel.shape[i] for i in numbers.rhs_spec[1:])  # input features and positions
            spread = math.prod(params["lhs_dilation"])  # zeros between inputs, which cost nothing
            total += 2 * out.size * taps / (spread * params["batch_group_count"])
        elif name.startswith("dot_product_attention"):
            b, queries, heads, width = equation.invars[0].aval.shape
            keys = equation.invars[1].aval.shape[1]
            products = 5 if "bwd" in name else 2
            total += products * 2 * b * heads * queries * keys * width
        else:
            inner = [product_flops(jaxpr) for jaxpr in platform.inner_jaxprs(equation)]
            times = params.get("length", 1) if name == "scan" else 1
            total += (max(inner, default=0) if name == "cond" else sum(inner)) * times
    return total


@dataclass(frozen=True)
class Counts:
    """Of one step on one device."""

    bytes: float  # read from and written to the device's memory, as XLA counts them after fusion
    collectives: dict[str, tuple[int, int]]  # kind → (how many, bytes of their results)


def of_program(compiled: Any) -> Counts:
    """The counts of a compiled program. A loop over steps counts once."""
    modules = compiled.runtime_executable().hlo_modules()
    client = jax.devices("cpu")[0].client
    traffic = sum(xla_client._xla.hlo_module_cost_analysis(client, m)["bytes accessed"] for m in modules)
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for line in compiled.as_text().splitlines():
        if match := _CALL.search(line):
            head = line[: match.start()].partition(" = ")[2]
            arrays = [_size(*array) for array in _ARRAY.findall(head)]
            # The start of an asynchronous all-reduce gives its operands beside its results: half of it counts.
            size = sum(arrays) // 2 if "-start(" in line and match[1] == "all-reduce" and "((" in head else sum(arrays)
            found[match[1]][0] += 1
            found[match[1]][1] += size
    return Counts(float(traffic), {kind: (n, size) for kind, (n, size) in found.items()})


def _size(dtype: str, shape: str) -> int:
    return _BYTES.get(dtype, 0) * math.prod(int(n) for n in shape.split(",") if n)


def bytes_a_device(tree: Any) -> int:
    """Of a pytree of arrays or `ShapeDtypeStruct` with shardings: what each device holds of it."""
    total = 0
    for x in jax.tree.leaves(tree):
        shape = x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) is not None else x.shape
        total += math.prod(shape) * x.dtype.itemsize
    return total
