"""Lazy values of a rewritten program: arrays with permuted axes, in float32 where the program says bfloat16."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

type Order = tuple[int, ...]
type Operand = Any  # an array, or a Permuted or Broadcast that stands for one
OMITTED, PENDING, DONE = range(3)  # whether a value is rounded to the program's dtype


def is_bfloat16(x: Operand) -> bool:
    """Whether x is bfloat16, which CPUs compute element-wise operations on in float32."""
    return getattr(x, "dtype", None) == jnp.bfloat16


def identity_order(ndim: int) -> Order:
    """The order of an array whose axes are not permuted."""
    return tuple(range(ndim))


class Permuted:
    """An array with its axes permuted: axis i of `array` is axis `order[i]` in the program.

    `dtype` is its dtype in the program; if that is bfloat16, `array` may still be float32. All readers see the same
    value: `array`, or `array` rounded to `dtype` if its rounding is PENDING (`rounding.py` decides).
    """

    def __init__(self, array: jax.Array, order: Order, dtype: np.dtype | None = None, rounding: int = OMITTED):
        self.array, self.order, self.dtype = array, order, array.dtype if dtype is None else dtype
        self._rounding = DONE if array.dtype == self.dtype else rounding
        self._rounded: list[jax.Array] = []  # `array` in `dtype`, once computed; shared by relabelled copies
        self._materialized: jax.Array | None = None

    def relabel(self, order: Order) -> "Permuted":
        """The same array with other axis labels, such as after a transpose in the program."""
        other = Permuted(self.array, order, self.dtype, self._rounding)
        other._rounded = self._rounded
        return other

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the program."""
        return tuple(self.array.shape[self.order.index(axis)] for axis in range(len(self.order)))

    @property
    def ndim(self) -> int:
        return len(self.order)

    @property
    def size(self) -> int:
        return self.array.size

    @property
    def rounding(self) -> int:
        """The rounding state of `elements`."""
        return DONE if self._rounded else self._rounding

    def round(self) -> None:
        """Rounds the value from now on."""
        self._rounding = max(self._rounding, PENDING)

    @property
    def rounded(self) -> jax.Array:
        """The value in `dtype`."""
        assert self._rounding, "rounding.py does not know that this value is read in bfloat16"
        if not self._rounded:
            self._rounded.append(self.array.astype(self.dtype) if self.array.dtype != self.dtype else self.array)
        return self._rounded[0]

    @property
    def wide(self) -> jax.Array:
        """The value for element-wise operations: in float32 if it is bfloat16."""
        if not is_bfloat16(self):
            return self.array
        return (self.rounded if self.rounding == PENDING else self.elements).astype(jnp.float32)

    @property
    def elements(self) -> jax.Array:
        """The array for operations that only copy elements; their result has the same `rounding`.

        Once the rounded array exists it is the one read, so that the float32 array can be freed.
        """
        return self._rounded[0] if self._rounded else self.array

    @property
    def materialized(self) -> jax.Array:
        """The array with the axes and dtype of the program."""
        if self._materialized is None:
            self._materialized = self.rounded.transpose(np.argsort(self.order))
        return self._materialized


@dataclass
class Broadcast:
    """A deferred broadcast, computed in the order that its reader needs: axis i of `value.array` is axis `axes[i]`."""

    value: Permuted
    axes: Order
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.value.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def rounding(self) -> int:
        return self.value.rounding

    def broadcast(self, array: jax.Array, order: Order) -> Operand:
        """Broadcasts `array`, one of the arrays of `value`, with its axes in `order`."""
        positions = [order.index(axis) for axis in self.axes]
        array = array.transpose(np.argsort(positions)) if array.ndim > 1 else array
        return lax.broadcast_in_dim(array, [self.shape[axis] for axis in order], sorted(positions))

    @functools.cached_property
    def materialized(self) -> jax.Array:
        """The array with the axes and dtype of the program."""
        return self.broadcast(self.value.rounded, identity_order(self.ndim))


def materialize(x: Operand) -> jax.Array:
    """The array with the axes and dtype of the program."""
    return x.materialized if isinstance(x, Permuted | Broadcast) else x


def rounding_of(args: Iterable[Operand]) -> int:
    """The least rounding state of the operands: unless OMITTED, an operation that copies elements may round later."""
    return min((x.rounding for x in args if isinstance(x, Permuted | Broadcast)), default=DONE)


def permuted(array: jax.Array, order: Order) -> Operand:
    """Wraps `array`, whose axis i is axis `order[i]` in the program."""
    return array if order == identity_order(len(order)) else Permuted(array, order)


def with_dtype(array: jax.Array, order: Order, dtype: np.dtype, rounding: int = OMITTED) -> Operand:
    """`permuted` for an array that has `dtype` in the program and may be wider here."""
    return permuted(array, order) if array.dtype == dtype else Permuted(array, order, dtype, rounding)


def align(x: Operand, order: Order, rounding: int = OMITTED) -> jax.Array:
    """x as an operand of an element-wise operation in `order`: float32 if it is bfloat16; scalars have no order.

    For an operation that copies elements, `rounding` is the `rounding_of` all its operands; pending roundings may then
    be applied to its result instead.
    """
    if isinstance(x, Permuted | Broadcast):
        value = x.value if isinstance(x, Broadcast) else x
        array = value.elements if rounding else value.wide
        array = array.astype(jnp.float32) if is_bfloat16(array) else array
        if isinstance(x, Broadcast):
            return x.broadcast(array, order)
        if x.order == order or not x.order:
            return array
        array = array.transpose(np.argsort(x.order))
    else:
        array = jnp.asarray(x, jnp.float32) if is_bfloat16(x) else x
        if np.ndim(x) == 0:
            return array
    return array if order == identity_order(len(order)) else array.transpose(order)
