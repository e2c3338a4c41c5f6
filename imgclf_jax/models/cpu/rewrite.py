"""The CPU layout pass: cancels transposes and bfloat16 roundings between the layers of a whole program.

Models use [b, h, w, c] and [b, n, d]; on CPU a layer computes on [c, h, w, b] and [d, b, n], where matmuls run near
peak (see `matmuls.py`), so it transposes its inputs and outputs. `rewrite` moves each transpose past the element-wise
operations, sums and slices that follow, until it meets its inverse. It also moves roundings to bfloat16 past
element-wise operations, which CPUs compute in float32; matmul operands are still rounded.

Unknown primitives run unchanged, on the program's own arrays. Results differ in two ways only: sums may accumulate in
another order, and some roundings are omitted. Apply `rewrite` after differentiation, to a function such as a train
step.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from imgclf_jax.core import cpuinfo
from imgclf_jax.core.jaxprs import BODIES, INLINED, Atom, aval_of, bind, isolate_matmuls, map_bodies, named
from imgclf_jax.core.typing import Function, PyTree
from imgclf_jax.models.cpu.moves import MOVES
from imgclf_jax.models.cpu.onednn import bind_matmul
from imgclf_jax.models.cpu.permuted import (
    OMITTED,
    Broadcast,
    Operand,
    Permuted,
    align,
    identity_order,
    is_bfloat16,
    materialize,
    permuted,
    rounding_of,
    with_dtype,
)
from imgclf_jax.models.cpu.rounding import COPIES, EXACT, FREE, ROUNDED, Needs, needs, reads_sign

_ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp clz copy copy_p cos cosh digamma div
    eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma log log1p logistic lt max min mul ne
    neg not or pow rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt
    square stop_gradient sub tan tanh xor""".split()  # noqa: SIM905
)


def optimize_for_cpu(function: Function, onednn: bool) -> Function:
    """Returns `function` as CPUs compute it fast: rewritten, or for oneDNN with its matmuls and convolutions apart."""
    if not onednn:
        return rewrite(function)
    # Fused, silu(y) + y of a float32 matmul y is wrong in jaxlib 0.12.
    return isolate_matmuls(function, matmul=bind if "avx512f" in cpuinfo.flags() else bind_matmul)


def rewrite(function: Function, need: int = ROUNDED) -> Function:
    """Returns `function`, of pytrees of arrays, with as few transposes and roundings as possible.

    `need` says what the readers of its results need, see `rounding.py`.
    """

    @functools.wraps(function)
    def rewritten(*args: PyTree) -> PyTree:
        jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        read = needs(jaxpr.jaxpr, [need] * len(jaxpr.jaxpr.outvars))
        out = [materialize(x) for x in _evaluate(jaxpr, jax.tree.leaves(args), read)]
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return rewritten


def _evaluate(closed: ClosedJaxpr, args: Sequence[Operand], read: Needs) -> list[Operand]:
    """Evaluates a closed jaxpr; arguments and results are arrays, `Permuted` or `Broadcast`."""
    jaxpr = closed.jaxpr
    values: dict[Var, Operand] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def value(atom: Atom) -> Operand:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for number, eqn in enumerate(jaxpr.eqns):
        with eqn.ctx.manager, named(eqn):
            results = _apply(eqn, [value(atom) for atom in eqn.invars], read.calls.get(number))
        for variable, x in zip(eqn.outvars, results, strict=True):
            values[variable] = x
            if isinstance(x, Permuted) and read.values.get(variable, FREE) & ROUNDED:
                x.round()
    return [value(atom) for atom in jaxpr.outvars]


def _apply(eqn: JaxprEqn, args: list[Operand], read: Needs | None) -> list[Operand]:
    name = eqn.primitive.name
    if read is not None:
        return _evaluate(eqn.params[INLINED[name]], args, read)
    if name in BODIES:  # rewritten separately
        params = {k: map_bodies(functools.partial(rewrite, need=EXACT), v) for k, v in eqn.params.items()}
        return bind(eqn, [materialize(x) for x in args], params)
    if name == "convert_element_type":
        return [_convert(eqn, args[0])]
    if name in _ELEMENTWISE:
        return _elementwise(eqn, args)
    moved = MOVES[name](eqn, args, bind) if name in MOVES else None
    if moved is not None:
        return moved
    if rounding_of(args):
        return bind(eqn, [materialize(x) for x in args])
    out = bind(eqn, [align(x, identity_order(np.ndim(x))) for x in args])
    return [with_dtype(y, identity_order(y.ndim), aval_of(v).dtype) for y, v in zip(out, eqn.outvars, strict=True)]


def _convert(eqn: JaxprEqn, x: Operand) -> Operand:
    new = eqn.params["new_dtype"]
    if new == jnp.bfloat16 and x.dtype == jnp.float32:
        array, order = (x.array, x.order) if isinstance(x, Permuted) else (materialize(x), identity_order(np.ndim(x)))
        return with_dtype(jnp.asarray(array), order, new)
    if is_bfloat16(x) and new == jnp.float32 and isinstance(x, Permuted):
        return permuted(x.wide, x.order)
    return _elementwise(eqn, [x])[0]


def _elementwise(eqn: JaxprEqn, args: list[Operand]) -> list[Operand]:
    """Computes in the order of the largest operand, permuted ones first; bfloat16 operands in float32."""
    if not any(isinstance(x, Permuted) or is_bfloat16(x) for x in args):
        return bind(eqn, [materialize(x) for x in args])
    ndim = max(np.ndim(x) for x in args)
    identity = identity_order(ndim)
    arrays = [x for x in args if np.ndim(x) == ndim and not isinstance(x, Broadcast)]
    orders = [(np.size(x), x.order if isinstance(x, Permuted) else identity) for x in arrays]
    _, order = max(orders, key=lambda pair: (pair[0], pair[1] != identity), default=(0, identity))
    rounding = rounding_of(args) if eqn.primitive.name in COPIES or reads_sign(eqn) else OMITTED
    operands = [align(x, order, rounding) for x in args]
    params = eqn.params
    if "new_dtype" in params and params["new_dtype"] == jnp.bfloat16:  # from integers
        params = {**params, "new_dtype": np.dtype(np.float32)}
    out = bind(eqn, operands, params)
    return [with_dtype(y, order, aval_of(v).dtype, rounding) for y, v in zip(out, eqn.outvars, strict=True)]
