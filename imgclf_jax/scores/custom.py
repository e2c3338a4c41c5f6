"""A user's own metric of a whole evaluation set."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Function


def checked(text: str, metric: Function) -> Callable[[Any], float]:
    """The metric of the spec `text` as a function of predictions. It raises UserError if the metric returns no number.

    The first call, such as a run's first evaluation, also raises UserError if the metric then returns another number.
    """
    calls = itertools.chain([2], itertools.repeat(1))  # of `metric`: at the first evaluation, and at each later one

    def compute(predictions: tuple[np.ndarray, ...]) -> float:
        first, *again = (metric(*predictions[:2]) for _ in range(next(calls)))
        if np.shape(first) or not hasattr(first, "__float__"):
            raise UserError(f"metrics={text!r} returns {first!r:.80}; return one number")
        if again and not np.array_equal(first, again[0], equal_nan=True):
            raise UserError(f"metrics={text!r} gives {first}, and {again[0]} in a second call for the same "
                            "predictions; it must not draw, count or change its arguments")  # fmt: skip
        return float(first)

    return compute
