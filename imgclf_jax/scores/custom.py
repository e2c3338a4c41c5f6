"""A user's own metric of a whole evaluation set."""

from collections.abc import Callable
from typing import Any

import numpy as np

from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Function


def checked(text: str, metric: Function) -> Callable[[Any], float]:
    """The metric of the spec `text` as a function of predictions. It raises UserError if the metric returns no number.

    The first call, such as a run's first evaluation, also raises UserError if the metric then returns another number.
    """
    repeats = True

    def compute(predictions: tuple[np.ndarray, ...]) -> float:
        nonlocal repeats
        value = metric(*predictions[:2])
        if np.shape(value) or not hasattr(value, "__float__"):
            raise UserError(f"metrics={text!r} returns {value!r:.80}; return one number")
        if repeats and not np.array_equal(value, again := metric(*predictions[:2]), equal_nan=True):
            raise UserError(f"metrics={text!r} gives {value}, and {again} in a second call for the same predictions; "
                            "it must not draw, count or change its arguments")  # fmt: skip
        repeats = False
        return float(value)

    return compute
