"""Operations that a transpose can be carried past, by their primitive's name.

Each is a function (eqn, operands, bind) → results, or None where this one cannot; `bind(eqn, arrays, params)` applies
the primitive.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from imgclf_jax.models.cpu.placed import (
    LEFT_OUT,
    Order,
    Placed,
    Spread,
    arranged,
    natural,
    of_dtype,
    of_order,
    rounding_of,
)

Bind = Callable[..., list[Any]]
Move = Callable[[Any, list[Any], Bind], list[Any] | None]


def _of_placed(move: Move) -> Move:
    """`move` for a first operand that is placed; of any other nothing needs to be carried."""

    def guarded(eqn: Any, args: list[Any], bind: Bind) -> list[Any] | None:
        return move(eqn, args, bind) if isinstance(args[0], Placed) else None

    return guarded


def _transpose(eqn: Any, args: list[Any], bind: Bind) -> list[Any]:
    x, permutation = args[0], eqn.params["permutation"]
    place = tuple(int(i) for i in np.argsort(permutation))
    if isinstance(x, Spread):
        return [Spread(x.value, tuple(place[a] for a in x.axes), tuple(x.shape[p] for p in permutation))]
    if isinstance(x, Placed):
        return [x.turned(tuple(place[axis] for axis in x.order))]
    return [of_order(x, place)]


def _broadcast(eqn: Any, args: list[Any], bind: Bind) -> list[Any] | None:
    if len(args) > 1:
        return None
    x, shape, axes = args[0], eqn.params["shape"], eqn.params["broadcast_dimensions"]
    if isinstance(x, Spread):
        return [Spread(x.value, tuple(axes[i] for i in x.axes), shape)] if _same(x.shape, axes, shape) else None
    if not isinstance(x, Placed):
        return [Spread(Placed(jnp.asarray(x), natural(np.ndim(x))), tuple(axes), tuple(shape))]
    if x.size != np.prod(shape):
        return [Spread(x, tuple(axes[i] for i in x.order), tuple(shape))]
    new = [i for i in range(len(shape)) if i not in axes]  # axes of size 1
    order = (*new, *(axes[i] for i in x.order))
    array = lax.broadcast_in_dim(x.moved, [shape[i] for i in order], range(len(new), len(shape)))
    return [of_dtype(array, order, x.dtype, x.rounding)]


def _same(small: tuple[int, ...], axes: Order, shape: tuple[int, ...]) -> bool:
    return all(n == shape[axis] for n, axis in zip(small, axes, strict=True))


def _barrier(eqn: Any, args: list[Any], bind: Bind) -> list[Any]:
    arrays = [x.narrow if isinstance(x, Placed) else x.whole if isinstance(x, Spread) else x for x in args]
    out = bind(eqn, arrays)
    return [of_order(y, x.order) if isinstance(x, Placed) else y for x, y in zip(args, out, strict=True)]


def _ranks(axes: list[int]) -> Order:
    """The places of the axes that are left, once the others are gone."""
    return tuple(sorted(axes).index(axis) for axis in axes)


@_of_placed
def _reduce(eqn: Any, args: list[Any], bind: Bind) -> list[Any] | None:
    x, axes = args[0], eqn.params["axes"]
    places = tuple(i for i, axis in enumerate(x.order) if axis in axes)
    order = _ranks([axis for axis in x.order if axis not in axes])
    copied = x.rounding if eqn.primitive.name in ("reduce_max", "reduce_min") else LEFT_OUT
    out = bind(eqn, [arranged(x, x.order, copied)], {**eqn.params, "axes": places})
    return [of_dtype(y, order, v.aval.dtype, copied) for y, v in zip(out, eqn.outvars, strict=True)]


def _by_axis(*names: str) -> Move:
    """Operations whose named parameters hold a value for each axis (or None)."""

    @_of_placed
    def move(eqn: Any, args: list[Any], bind: Bind) -> list[Any] | None:
        x = args[0]
        moved = {n: tuple(eqn.params[n][axis] for axis in x.order) for n in names if eqn.params[n] is not None}
        copied = rounding_of(args)
        array = x.moved if copied else x.wide
        others = [jnp.asarray(arranged(y, (), copied), array.dtype) for y in args[1:]]  # scalars
        return [of_dtype(bind(eqn, [array, *others], {**eqn.params, **moved})[0], x.order, x.dtype, copied)]

    return move


def _concatenate(eqn: Any, args: list[Any], bind: Bind) -> list[Any] | None:
    x = max(args, key=lambda x: (isinstance(x, Placed), x.size))
    if not isinstance(x, Placed):
        return None
    params = {**eqn.params, "dimension": x.order.index(eqn.params["dimension"])}
    copied = rounding_of(args)
    arrays = [arranged(y, x.order, copied) for y in args]
    return [of_dtype(bind(eqn, arrays, params)[0], x.order, x.dtype, copied)]


@_of_placed
def _reverse(eqn: Any, args: list[Any], bind: Bind) -> list[Any] | None:
    x = args[0]
    params = {**eqn.params, "dimensions": tuple(x.order.index(i) for i in eqn.params["dimensions"])}
    return [of_dtype(bind(eqn, [x.moved], params)[0], x.order, x.dtype, x.rounding)]


@_of_placed
def _squeeze(eqn: Any, args: list[Any], bind: Bind) -> list[Any] | None:
    x, gone = args[0], eqn.params["dimensions"]
    params = {**eqn.params, "dimensions": tuple(i for i, axis in enumerate(x.order) if axis in gone)}
    order = _ranks([axis for axis in x.order if axis not in gone])
    return [of_dtype(bind(eqn, [x.moved], params)[0], order, x.dtype, x.rounding)]


@_of_placed
def _split(eqn: Any, args: list[Any], bind: Bind) -> list[Any] | None:
    """A reshape that splits axes, each into some that follow each other; any other is not moved."""
    x, new = args[0], list(eqn.params["new_sizes"])
    if eqn.params.get("dimensions") is not None:
        return None
    parts: list[list[int]] = []  # of each axis of x, the new ones
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
    return [of_dtype(x.moved.reshape([new[axis] for axis in order]), order, x.dtype, x.rounding)]


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
