"""Rules that move a transpose past an operation, by primitive name.

A rule maps (eqn, operands, bind) to the results, or to None where the transpose cannot move past this equation;
`bind(eqn, arrays, params)` applies the primitive.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from imgclf_jax.core.jaxprs import aval_of
from imgclf_jax.models.cpu.permuted import (
    OMITTED,
    Broadcast,
    Operand,
    Order,
    Permuted,
    align,
    identity_order,
    permuted,
    rounding_of,
    with_dtype,
)

type Bind = Callable[..., list[Operand]]
type Move = Callable[[JaxprEqn, list[Operand], Bind], list[Operand] | None]


def _if_permuted(move: Move) -> Move:
    """Restricts a rule to a permuted first operand; there is nothing to move otherwise."""

    def guarded(eqn: JaxprEqn, args: list[Operand], bind: Bind) -> list[Operand] | None:
        return move(eqn, args, bind) if isinstance(args[0], Permuted) else None

    return guarded


def _transpose(eqn: JaxprEqn, args: list[Operand], bind: Bind) -> list[Operand]:
    x, permutation = args[0], eqn.params["permutation"]
    new_axis = tuple(int(i) for i in np.argsort(permutation))
    if isinstance(x, Broadcast):
        return [Broadcast(x.value, tuple(new_axis[a] for a in x.axes), tuple(x.shape[p] for p in permutation))]
    if isinstance(x, Permuted):
        return [x.relabel(tuple(new_axis[axis] for axis in x.order))]
    return [permuted(x, new_axis)]


def _broadcast(eqn: JaxprEqn, args: list[Operand], bind: Bind) -> list[Operand] | None:
    if len(args) > 1:
        return None
    x, shape, axes = args[0], eqn.params["shape"], eqn.params["broadcast_dimensions"]
    if isinstance(x, Broadcast):
        return [Broadcast(x.value, tuple(axes[i] for i in x.axes), shape)] if _keeps_shape(x.shape, axes, shape) else (
            None)  # fmt: skip
    if not isinstance(x, Permuted):
        return [Broadcast(Permuted(jnp.asarray(x), identity_order(np.ndim(x))), tuple(axes), tuple(shape))]
    if x.size != np.prod(shape):
        return [Broadcast(x, tuple(axes[i] for i in x.order), tuple(shape))]
    new = [i for i in range(len(shape)) if i not in axes]  # axes of size 1
    order = (*new, *(axes[i] for i in x.order))
    array = lax.broadcast_in_dim(x.elements, [shape[i] for i in order], range(len(new), len(shape)))
    return [with_dtype(array, order, x.dtype, x.rounding)]


def _keeps_shape(small: tuple[int, ...], axes: Order, shape: tuple[int, ...]) -> bool:
    return all(n == shape[axis] for n, axis in zip(small, axes, strict=True))


def _barrier(eqn: JaxprEqn, args: list[Operand], bind: Bind) -> list[Operand]:
    arrays = [x.rounded if isinstance(x, Permuted) else x.materialized if isinstance(x, Broadcast) else x for x in args]
    out = bind(eqn, arrays)
    return [permuted(y, x.order) if isinstance(x, Permuted) else y for x, y in zip(args, out, strict=True)]


def _ranks(axes: list[int]) -> Order:
    """Renumbers the remaining axes after others were removed."""
    return tuple(sorted(axes).index(axis) for axis in axes)


@_if_permuted
def _reduce(eqn: JaxprEqn, args: list[Operand], bind: Bind) -> list[Operand] | None:
    x, axes = args[0], eqn.params["axes"]
    reduced = tuple(i for i, axis in enumerate(x.order) if axis in axes)
    order = _ranks([axis for axis in x.order if axis not in axes])
    rounding = x.rounding if eqn.primitive.name in ("reduce_max", "reduce_min") else OMITTED
    out = bind(eqn, [align(x, x.order, rounding)], {**eqn.params, "axes": reduced})
    return [with_dtype(y, order, aval_of(v).dtype, rounding) for y, v in zip(out, eqn.outvars, strict=True)]


def _by_axis(*names: str) -> Move:
    """A rule for operations whose named parameters hold one value per axis (or None)."""

    @_if_permuted
    def move(eqn: JaxprEqn, args: list[Operand], bind: Bind) -> list[Operand] | None:
        x = args[0]
        moved = {n: tuple(eqn.params[n][axis] for axis in x.order) for n in names if eqn.params[n] is not None}
        rounding = rounding_of(args)
        array = x.elements if rounding else x.wide
        others = [jnp.asarray(align(y, (), rounding), array.dtype) for y in args[1:]]  # scalars
        return [with_dtype(bind(eqn, [array, *others], {**eqn.params, **moved})[0], x.order, x.dtype, rounding)]

    return move


def _concatenate(eqn: JaxprEqn, args: list[Operand], bind: Bind) -> list[Operand] | None:
    x = max(args, key=lambda x: (isinstance(x, Permuted), x.size))
    if not isinstance(x, Permuted):
        return None
    params = {**eqn.params, "dimension": x.order.index(eqn.params["dimension"])}
    rounding = rounding_of(args)
    arrays = [align(y, x.order, rounding) for y in args]
    return [with_dtype(bind(eqn, arrays, params)[0], x.order, x.dtype, rounding)]


@_if_permuted
def _reverse(eqn: JaxprEqn, args: list[Operand], bind: Bind) -> list[Operand] | None:
    x = args[0]
    params = {**eqn.params, "dimensions": tuple(x.order.index(i) for i in eqn.params["dimensions"])}
    return [with_dtype(bind(eqn, [x.elements], params)[0], x.order, x.dtype, x.rounding)]


@_if_permuted
def _squeeze(eqn: JaxprEqn, args: list[Operand], bind: Bind) -> list[Operand] | None:
    x, removed = args[0], eqn.params["dimensions"]
    params = {**eqn.params, "dimensions": tuple(i for i, axis in enumerate(x.order) if axis in removed)}
    order = _ranks([axis for axis in x.order if axis not in removed])
    return [with_dtype(bind(eqn, [x.elements], params)[0], order, x.dtype, x.rounding)]


@_if_permuted
def _split(eqn: JaxprEqn, args: list[Operand], bind: Bind) -> list[Operand] | None:
    """Moves a transpose past a reshape that only splits axes; None for any other reshape."""
    x, new = args[0], list(eqn.params["new_sizes"])
    if eqn.params.get("dimensions") is not None:
        return None
    parts: list[list[int]] = []  # the new axes of each axis of x
    first = 0
    for size in x.shape:
        last, product = first, 1
        while last < len(new) and (product < size or (size == 1 and last == first)):
            product *= new[last]
            last += 1
        if product != size:
            return None
        parts.append(list(range(first, last)))
        first = last
    if first != len(new):
        return None
    order = tuple(axis for old in x.order for axis in parts[old])
    return [with_dtype(x.elements.reshape([new[axis] for axis in order]), order, x.dtype, x.rounding)]


MOVES: dict[str, Move] = {
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "optimization_barrier": _barrier,
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"), _reduce),
    **dict.fromkeys(("argmax", "argmin"), _reduce),
    "slice": _by_axis("start_indices", "limit_indices", "strides"),
    "pad": _by_axis("padding_config"),
    "concatenate": _concatenate,
    "rev": _reverse,
    "squeeze": _squeeze,
    "reshape": _split,
}
