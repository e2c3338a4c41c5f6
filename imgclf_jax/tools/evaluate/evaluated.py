"""The evaluation of a whole set: its metrics, its scores with intervals, and its classes."""

import dataclasses
import itertools

import numpy as np

from imgclf_jax import metrics
from imgclf_jax.core import processes
from imgclf_jax.data import stream
from imgclf_jax.metrics import AnyPredictions
from imgclf_jax.programs import Programs
from imgclf_jax.scores.classification import Predictions
from imgclf_jax.scores.multilabel import TargetPredictions
from imgclf_jax.tools.evaluate import by_class
from imgclf_jax.tools.evaluate.intervals import with_intervals
from imgclf_jax.train.evaluation import evaluate
from imgclf_jax.trained import Trained


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluated:
    """The evaluation of a set. With several seeds, everything but `metrics` describes the ensemble."""

    metrics: dict[str, float]
    scores: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # see `with_intervals`
    counts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # see `by_class.counts`
    multilabel: TargetPredictions | None = None


def has_few_classes(model: Trained) -> bool:
    """Whether the predictions of a whole set fit into memory, and a confusion matrix can be read."""
    return len(model.class_names) <= metrics.CONFUSION_CLASSES


def evaluate_set(
    model: Trained, programs: Programs, name: str, images: stream.Images
) -> tuple[Evaluated, AnyPredictions | None]:
    """Evaluates a set by `programs`, those of the model, which may be `predicting`; returns the predictions too.

    Without predictions, with very many classes, and on all processes but the first, there are metrics alone.
    """
    sums, predicted = evaluate(programs, model.state, images, caption=f"evaluating {name}")
    summary = metrics.summarize(sums, predicted, programs.recipe.whole_set_metrics)
    if predicted is None or processes.index():
        return Evaluated(summary), None
    if programs.recipe.config.num_seeds > 1:
        if isinstance(predicted, Predictions):
            pairs = itertools.combinations(predicted.predicted[:-1], 2)
            summary["disagreement"] = float(np.mean([np.mean(a != b) for a, b in pairs]))  # of two seeds' classes
        predicted = predicted.for_seed(-1)
    if isinstance(predicted, Predictions) and not has_few_classes(model):
        return Evaluated(summary), predicted
    scores = with_intervals(predicted.compute, len(images), len(model.class_names))
    if isinstance(predicted, TargetPredictions):
        return Evaluated(summary, scores, multilabel=predicted), predicted
    return Evaluated(summary, scores, by_class.counts(predicted)), predicted
