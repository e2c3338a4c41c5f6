"""Values of a program that is rewritten: arrays in another order, or not yet rounded, than the program says."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

Order = tuple[int, ...]
LEFT_OUT, TO_COME, DONE = range(3)  # a rounding to the program's dtype


def is_low(x: Any) -> bool:
    """Whether x is of bfloat16, which CPUs compute element-wise operations of in float32."""
    return getattr(x, "dtype", None) == jnp.bfloat16


def natural(ndim: int) -> Order:
    """The order of an array whose axes lie as its program says."""
    return tuple(range(ndim))


class Placed:
    """An array that lies in another order than its program says: axis i of `array` is its own axis `order[i]`.

    It is of `dtype` by the program; where that is bfloat16, `array` may be of float32 still. All that read it see the
    same value: `array`, or `array` rounded where that is TO_COME (`rounding.py` decides).
    """

    def __init__(self, array: Any, order: Order, dtype: Any = None, rounding: int = LEFT_OUT):
        self.array, self.order, self.dtype = array, order, array.dtype if dtype is None else dtype
        self._rounding = DONE if array.dtype == self.dtype else rounding
        self._narrow: list[Any] = []  # `array` in `dtype`, once it was asked for
        self._whole: Any = None

    def turned(self, order: Order) -> "Placed":
        """The same array, whose axes are others by the program."""
        other = Placed(self.array, order, self.dtype, self._rounding)
        other._narrow = self._narrow
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
    def rounding(self) -> int:
        """Of what `moved` holds."""
        return DONE if self._narrow else self._rounding

    def round(self) -> None:
        """From now on the value is rounded."""
        self._rounding = max(self._rounding, TO_COME)

    @property
    def narrow(self) -> Any:
        """The value in `dtype`."""
        assert self._rounding, "rounding.py does not know that this value is read in bfloat16"
        if not self._narrow:
            self._narrow.append(self.array.astype(self.dtype) if self.array.dtype != self.dtype else self.array)
        return self._narrow[0]

    @property
    def wide(self) -> Any:
        """The value for element-wise operations: in float32 where it is bfloat16."""
        if not is_low(self):
            return self.array
        return (self.narrow if self.rounding == TO_COME else self.moved).astype(jnp.float32)

    @property
    def moved(self) -> Any:
        """`array` for operations that copy elements, of whose results `rounding` says the same.

        Once it was written out in bfloat16, that is what is read, so that the float32 array need not be kept.
        """
        return self._narrow[0] if self._narrow else self.array

    @property
    def whole(self) -> Any:
        """The array as its program says."""
        if self._whole is None:
            self._whole = self.narrow.transpose(np.argsort(self.order))
        return self._whole


@dataclass
class Spread:
    """A broadcast, written out in whichever order it is needed: axis i of `value.array` is its own axis `axes[i]`."""

    value: Placed
    axes: Order
    shape: tuple[int, ...]

    @property
    def dtype(self) -> Any:
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

    def turned(self, array: Any, order: Order) -> Any:
        """`array`, one of those of `value`, broadcast, with its axes in `order`."""
        places = [order.index(axis) for axis in self.axes]
        array = array.transpose(np.argsort(places)) if array.ndim > 1 else array
        return lax.broadcast_in_dim(array, [self.shape[axis] for axis in order], sorted(places))

    @functools.cached_property
    def whole(self) -> Any:
        """The array as its program says."""
        return self.turned(self.value.narrow, natural(self.ndim))


def whole(x: Any) -> Any:
    """An array as its program says."""
    return x.whole if isinstance(x, Placed | Spread) else x


def rounding_of(args: Iterable[Any]) -> int:
    """The least of the operands': what copies elements of them may be rounded afterwards unless it is LEFT_OUT."""
    return min((x.rounding for x in args if isinstance(x, Placed | Spread)), default=DONE)


def of_order(array: Any, order: Order) -> Any:
    """`array`, whose axis i is the program's axis `order[i]`."""
    return array if order == natural(len(order)) else Placed(array, order)


def of_dtype(array: Any, order: Order, dtype: Any, rounding: int = LEFT_OUT) -> Any:
    """`of_order` of what the program has in `dtype`, and `array` in a wider one perhaps."""
    return of_order(array, order) if array.dtype == dtype else Placed(array, order, dtype, rounding)


def arranged(x: Any, order: Order, copied: int = LEFT_OUT) -> Any:
    """x for an element-wise operation in `order`, in float32 where it is bfloat16; a scalar is of no order.

    `copied` is the `rounding_of` all operands for one that copies elements: those to come may then come after it.
    """
    if isinstance(x, Placed | Spread):
        value = x.value if isinstance(x, Spread) else x
        array = value.moved if copied else value.wide
        array = array.astype(jnp.float32) if is_low(array) else array
        if isinstance(x, Spread):
            return x.turned(array, order)
        if x.order == order or not x.order:
            return array
        array = array.transpose(np.argsort(x.order))
    else:
        array = jnp.asarray(x, jnp.float32) if is_low(x) else x
        if np.ndim(x) == 0:
            return array
    return array if order == natural(len(order)) else array.transpose(order)
