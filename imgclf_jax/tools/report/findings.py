"""The content of a report that needs the model or the data: evaluations and top losses."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import datasets, metrics
from imgclf_jax.core.errors import Untrusted, UserError
from imgclf_jax.data.source import Source
from imgclf_jax.data.stream import Images
from imgclf_jax.scores.classification import BINS, Predictions, confidence_bins
from imgclf_jax.scores.multilabel import TargetPredictions
from imgclf_jax.tools.evaluate import by_class
from imgclf_jax.tools.evaluate.changes import data_changes
from imgclf_jax.tools.evaluate.intervals import with_intervals
from imgclf_jax.tools.explain import explanations
from imgclf_jax.tools.report import top_losses as report_top_losses
from imgclf_jax.tools.report.top_losses import TopLoss
from imgclf_jax.train.evaluation import evaluate, open_evals
from imgclf_jax.train.leakage import overlap_warnings
from imgclf_jax.trained import Trained

log = logging.getLogger(__name__)

TOP_LOSSES = 24  # at most, over all sets


class Reliability(NamedTuple):
    """The bins of a reliability diagram (DeGroot and Fienberg 1983, Guo et al. 2017); means of an empty one are NaN."""

    examples: np.ndarray  # i64[bins]
    confidence: np.ndarray  # f64[bins]: the mean probability of the predicted class
    accuracy: np.ndarray  # f64[bins]


def bin_by_confidence(confidence: np.ndarray, correct: np.ndarray) -> Reliability:
    """Bins predictions as the calibration error does, without NaN; confidence f64[n], correct bool[n]."""
    known = ~np.isnan(confidence)
    bins = confidence_bins(confidence[known])
    count, *sums = (np.bincount(bins, weights, BINS) for weights in (None, confidence[known], correct[known]))
    with np.errstate(invalid="ignore"):
        return Reliability(count, *(total / count for total in sums))


def selective_risk(predictions: Predictions) -> np.ndarray:
    """f64[n]: the error of the k most confident examples, k from 1 to n (Geifman, El-Yaniv 2017, arXiv:1705.08500)."""
    order = np.argsort(-predictions.log_odds.max(1), kind="stable")  # float32 rounds high probabilities to 1
    return np.cumsum(predictions.ranks[order] > 0) / np.arange(1, len(order) + 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluated:
    """The evaluation of a set. With several seeds, everything but `metrics` describes the ensemble."""

    name: str
    metrics: dict[str, float]
    scores: dict[str, dict[str, float]]  # see `with_intervals`; with very many classes, this and the rest are empty
    counts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # see `by_class.counts`
    reliability: Reliability | None = None
    risk: np.ndarray | None = None  # see `selective_risk`
    top_losses: tuple[TopLoss, ...] = ()  # the highest first
    wrong: int = 0  # the misclassified examples, with those without a prediction, as accuracy counts them
    method: str = ""  # explains the top losses, see `explanations`
    multilabel: TargetPredictions | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Findings:
    """Everything that needs the trained model or the data. The sentences in `missing` say what is absent."""

    step: int | None = None  # of the checkpoint
    sets: tuple[Evaluated, ...] = ()
    missing: tuple[str, ...] = ()
    parameters: Mapping[str, int] = dataclasses.field(default_factory=dict)  # by module of the model
    flops: float = 0.0  # of the model's forward pass of an image


def find(model: Trained, recorded: ConfigDict, fingerprints: Mapping[str, str]) -> Findings:
    """Evaluates a model on all of its sets.

    - `recorded` is the config of its run; the model's config may have more evaluation sets.
    - `fingerprints` are those of the evaluation sets that the run recorded, by name.

    If the data are gone, `missing` says so. Raises Untrusted for data that would run code.
    """
    programs, base = model.programs, dict[str, Source]()
    sets: tuple[Evaluated, ...] = ()
    missing: list[str] = []
    with _noting(missing, "The data cannot be opened, so this page omits everything that needs them"):
        base = datasets.open_data(model.config)
    if base:
        missing += [f"{sentence[0].upper()}{sentence[1:]}."
                    for sentence in overlap_warnings(recorded, model.config.data, base)]  # fmt: skip
        with _noting(missing, "The evaluation sets are omitted"):
            evals = open_evals(programs, base)
            missing += [f"{sentence[0].upper()}{sentence[1:]}."
                        for sentence in data_changes(programs, recorded, fingerprints, base, evals)]  # fmt: skip
            sets = _evaluate(model, evals)
    for sentence in missing:
        log.warning("%s", sentence)
    return Findings(model.step, sets, tuple(missing))


@contextlib.contextmanager
def _noting(missing: list[str], what: str) -> Iterator[None]:
    """Turns an error into a sentence in `missing`, after `what`. Raises Untrusted for data that would run code."""
    try:
        yield
    except Untrusted:
        raise
    except (UserError, OSError) as e:
        missing.append(f"{what}: {e}")


def _evaluate(model: Trained, evals: Mapping[str, Images]) -> tuple[Evaluated, ...]:
    few_classes = len(model.class_names) <= metrics.CONFUSION_CLASSES  # else the probabilities may not fit into memory
    programs = dataclasses.replace(model.programs, predicting=few_classes)
    explainer = functools.cache(lambda: explanations.build(model))  # built once
    evaluated: list[Evaluated] = []
    for name, images in evals.items():
        log.info("evaluating %s (%d of %d): %d examples", name, len(evaluated) + 1, len(evals), len(images))
        sums, predictions = evaluate(programs, model.state, images, caption=f"evaluating {name}")
        several = programs.recipe.config.num_seeds > 1
        one = Evaluated(name, metrics.summarize(sums, predictions, programs.recipe.whole_set_metrics), {})
        if few_classes and isinstance(predictions, Predictions):
            own = predictions.for_seed(-1) if several else predictions
            highest = report_top_losses.highest_losses(own, max(1, TOP_LOSSES // len(evals)))
            intervals = with_intervals(own.compute, len(images), len(model.class_names))
            reliability = bin_by_confidence(own.probabilities.max(1), own.ranks == 0)
            one = dataclasses.replace(one, scores=intervals, counts=by_class.counts(own), reliability=reliability,
                                      risk=selective_risk(own), wrong=int((own.ranks > 0).sum()))  # fmt: skip
            if highest.size:
                method, explain = explainer()
                log.info("explaining %d examples by %s", len(highest), method)
                found = report_top_losses.describe(programs, images, own, highest, explain)
                one = dataclasses.replace(one, top_losses=found, method=method)
        elif isinstance(predictions, TargetPredictions):
            targets = predictions.for_seed(-1) if several else predictions
            intervals = with_intervals(targets.compute, len(images), len(model.class_names))
            one = dataclasses.replace(one, scores=intervals, multilabel=targets)
        evaluated.append(one)
    return tuple(evaluated)
