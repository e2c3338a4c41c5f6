"""Scores of regression, as functions of example weights."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class RegressionScores:
    """Scores of predicted values f32[n, outputs] for targets f32[n, outputs]; `names` has a name per output."""

    targets: np.ndarray
    values: np.ndarray
    names: Sequence[str] = ()

    @functools.cached_property
    def errors(self) -> np.ndarray:
        """f64[n, outputs]: the predicted minus the true values."""
        return self.values.astype(np.float64) - self.targets.astype(np.float64)

    def compute(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Returns `r2`, `mae` and `rmse` f64[r] by name, as means over the outputs, for example weights f64[r, n].

        Several outputs also have scores of each, such as `mae[angle]`. Errors are in the unit of the target. `r2` is
        NaN if all targets of an output are equal.
        """
        scores = self.by_output(weights)
        means = {name: values.mean(1) for name, values in scores.items()}
        if len(self.names) > 1:
            means |= {f"{name}[{output}]": values[:, i]
                      for i, output in enumerate(self.names) for name, values in scores.items()}  # fmt: skip
        return means

    def by_output(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """{"r2", "mae", "rmse": f64[r, outputs]}."""
        total = weights.sum(1, keepdims=True)
        squares = weights @ self.errors**2 / total
        centred = self.targets.astype(np.float64) - self.targets.mean(0, dtype=np.float64)
        varied = (centred != centred[0]).any(0)  # constant targets may have a variance by rounding
        variance = weights @ centred**2 / total - (weights @ centred / total) ** 2
        known = varied & (variance > 1e-12 * (centred**2).mean(0))
        r2 = 1 - np.divide(squares, variance, out=np.full_like(squares, np.nan), where=known)
        return {"r2": r2, "mae": weights @ np.abs(self.errors) / total, "rmse": np.sqrt(squares)}
