"""Scores of predicted numbers, as functions of weights of the examples: see `scores`."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class RegressionScores:
    """Scores of values f32[n, outputs] for targets f32[n, outputs]; `names` are those of the outputs."""

    targets: np.ndarray
    values: np.ndarray
    names: Sequence[str] = ()

    @functools.cached_property
    def errors(self) -> np.ndarray:
        """f64[n, outputs]: predicted less true."""
        return self.values.astype(np.float64) - self.targets.astype(np.float64)

    def of(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """{name: f64[r]} for weights f64[r, n] of the examples: `r2`, `mae`, `rmse`.

        Each is the mean over the outputs. Of several outputs also each output's, such as `mae[angle]`. Errors are in
        the unit of the target. `r2` is NaN where the targets of an output are all equal.
        """
        each = self.by_output(weights)
        means = {name: values.mean(1) for name, values in each.items()}
        if len(self.names) > 1:
            means |= {f"{name}[{of}]": values[:, i] for i, of in enumerate(self.names) for name, values in each.items()}
        return means

    def by_output(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """{"r2", "mae", "rmse": f64[r, outputs]}."""
        total = weights.sum(1, keepdims=True)
        squares = weights @ self.errors**2 / total
        centred = self.targets.astype(np.float64) - self.targets.mean(0, dtype=np.float64)
        varied = (centred != centred[0]).any(0)  # rounding alone may leave a variance
        variance = weights @ centred**2 / total - (weights @ centred / total) ** 2
        known = varied & (variance > 1e-12 * (centred**2).mean(0))
        r2 = 1 - np.divide(squares, variance, out=np.full_like(squares, np.nan), where=known)
        return {"r2": r2, "mae": weights @ np.abs(self.errors) / total, "rmse": np.sqrt(squares)}
