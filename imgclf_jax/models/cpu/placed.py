"""Values of a program that is rewritten: arrays in another order, or not yet rounded, than the program says."""

import functools
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

Order = tuple[int, ...]


def is_low(x: Any) -> bool:
    """Whether x is of bfloat16, which CPUs compute element-wise operations of in float32."""
    return getattr(x, "dtype", None) == jnp.bfloat16


class Placed:
    """An array that lies in another order than its program says: axis i of `array` is its own axis `order[i]`.

    It is of `dtype` by the program; where that is bfloat16, `array` may be of float32 still.
    """

    def __init__(self, array: Any, order: Order, dtype: Any = None):
        self.array, self.order, self.dtype = array, order, array.dtype if dtype is None else dtype
        self._rounded: list[Any] = []  # `array` in `dtype`, once it was asked for
        self._whole: Any = None

    def turned(self, order: Order) -> "Placed":
        """The same array, whose axes are others by the program."""
        other = Placed(self.array, order, self.dtype)
        other._rounded = self._rounded
        return other

    @property
    def shape(self) -> tuple[int, ...]:
        """By the program."""
        return tuple(self.array.shape[self.order.index(axis)] for axis in range(len(self.order)))

    @property
    def ndim(self) -> int:
        return len(self.order)

    @property
    def size(self) -> int:
        return self.array.size

    @property
    def narrow(self) -> Any:
        """`array` in `dtype`."""
        if not self._rounded:
            self._rounded.append(self.array.astype(self.dtype) if self.array.dtype != self.dtype else self.array)
        return self._rounded[0]

    @property
    def wide(self) -> Any:
        """`array` for element-wise operations: float32 where it is bfloat16.

        Once it was written out in bfloat16, that is what is read, so that the float32 array need not be kept.
        """
        return self.moved.astype(jnp.float32) if is_low(self) else self.array

    @property
    def moved(self) -> Any:
        """`array` for operations that only move it: rounded where it is anyway."""
        return self._rounded[0] if self._rounded else self.array

    @property
    def whole(self) -> Any:
        """The array as its program says."""
        if self._whole is None:
            self._whole = self.narrow.transpose(np.argsort(self.order))
        return self._whole


@dataclass
class Spread:
    """A broadcast that is written out in whichever order it is needed: axis i of `array` is its own axis `axes[i]`."""

    array: Any
    axes: Order
    shape: tuple[int, ...]

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def turned(self, order: Order, dtype: Any = None) -> Any:
        """The broadcast array with its axes in `order`."""
        places = [order.index(axis) for axis in self.axes]
        array = self.array if dtype is None else self.array.astype(dtype)
        array = array.transpose(np.argsort(places)) if array.ndim > 1 else array
        return lax.broadcast_in_dim(array, [self.shape[axis] for axis in order], sorted(places))

    @functools.cached_property
    def whole(self) -> Any:
        """The array as its program says."""
        return self.turned(tuple(range(len(self.shape))))


def whole(x: Any) -> Any:
    """An array as its program says."""
    return x.whole if isinstance(x, Placed | Spread) else x


def of_order(array: Any, order: Order) -> Any:
    """`array`, whose axis i is the program's axis `order[i]`."""
    return array if order == tuple(range(len(order))) else Placed(array, order)


def of_dtype(array: Any, order: Order, dtype: Any) -> Any:
    """`of_order` of what the program has in `dtype`, and `array` in a wider one perhaps."""
    if array.dtype == dtype:
        return of_order(array, order)
    return Placed(array, order, dtype) if order else array.astype(dtype)


def arranged(x: Any, order: Order) -> Any:
    """x for an element-wise operation in `order`; a scalar is of no order."""
    if isinstance(x, Spread):
        return x.turned(order, jnp.float32 if is_low(x) else None)
    if isinstance(x, Placed) and x.order == order:
        return x.wide
    if np.ndim(x) == 0:
        return jnp.asarray(x, jnp.float32) if is_low(x) else x
    array = x.wide.transpose(np.argsort(x.order)) if isinstance(x, Placed) else x
    array = array.astype(jnp.float32) if is_low(array) else array
    return array if order == tuple(range(len(order))) else array.transpose(order)
