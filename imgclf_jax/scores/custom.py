"""A user's own metric of a whole evaluation set."""

import numpy as np

from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Function


def compute(text: str, metric: Function, predictions: tuple[np.ndarray, ...]) -> float:
    """The value of the metric of the spec `text`. Raises UserError if it is no number, or another in a second call."""
    first, again = (metric(*predictions[:2]) for _ in range(2))
    if np.shape(first) or not hasattr(first, "__float__"):
        raise UserError(f"metrics={text!r} returns {first!r:.80}; return one number")
    if not np.array_equal(first, again, equal_nan=True):
        raise UserError(f"metrics={text!r} gives {first}, and {again} in a second call for the same predictions; it "
                        "must not draw, count or change its arguments")  # fmt: skip
    return float(first)
