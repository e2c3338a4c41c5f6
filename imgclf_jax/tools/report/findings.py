"""The content of a report that needs the model or the data: evaluations and top losses."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import datasets
from imgclf_jax.augment.ops import to_pixels
from imgclf_jax.core.errors import Untrusted, UserError
from imgclf_jax.data.stream import Images
from imgclf_jax.programs import Programs
from imgclf_jax.scores.classification import BINS, Predictions, confidence_bins
from imgclf_jax.tools.evaluate.changes import data_changes
from imgclf_jax.tools.evaluate.evaluated import Evaluated, evaluate_set, has_few_classes
from imgclf_jax.tools.explain import explanations
from imgclf_jax.tools.explain.explanations import Explain
from imgclf_jax.train.evaluation import open_evals
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


class TopLoss(NamedTuple):
    """An example with a high loss, misclassified or not."""

    example: str  # its file or index
    label: int
    predicted: int
    probability: float  # of the predicted class
    label_probability: float
    loss: float  # the negative log-likelihood of the label
    image: np.ndarray  # f32[h, w, c] in [0, 1]: the model's input before normalization
    heat: np.ndarray  # [h', w']: a heatmap of the predicted class


class Section(NamedTuple):
    """The findings on an evaluation set. With several seeds, everything but the metrics describes the ensemble."""

    name: str
    evaluated: Evaluated
    reliability: Reliability | None = None
    risk: np.ndarray | None = None  # see `selective_risk`
    top_losses: tuple[TopLoss, ...] = ()  # the highest first
    method: str = ""  # explains the top losses, see `explanations`


@dataclasses.dataclass(frozen=True, eq=False)
class Findings:
    """Everything that needs the trained model or the data. The sentences in `missing` say what is absent."""

    step: int | None = None  # of the checkpoint
    sets: tuple[Section, ...] = ()
    missing: tuple[str, ...] = ()
    parameters: Mapping[str, int] = dataclasses.field(default_factory=dict)  # by module of the model
    flops: float = 0.0  # of the model's forward pass of an image


def find(model: Trained, recorded: ConfigDict, fingerprints: Mapping[str, str]) -> Findings:
    """Evaluates a model on all of its sets.

    - `recorded` is the config of its run; the model's config may have more evaluation sets.
    - `fingerprints` are those of the evaluation sets that the run recorded, by name.

    If the data are gone, `missing` says so. Raises Untrusted for data that would run code.
    """
    programs, missing, doubts = model.programs, list[str](), list[str]()
    sets: tuple[Section, ...] = ()
    with _noting(missing, "The data cannot be opened, so this page omits everything that needs them"):
        base = datasets.open_data(model.config)
        doubts += overlap_warnings(recorded, model.config.data, base)
        with _noting(missing, "The evaluation sets are omitted"):
            evals = open_evals(programs, base)
            doubts += data_changes(programs, recorded, fingerprints, base, evals)
            sets = _evaluate(model, evals)
    return Findings(model.step, sets, (*missing, *(f"{doubt[0].upper()}{doubt[1:]}." for doubt in doubts)))


@contextlib.contextmanager
def _noting(missing: list[str], what: str) -> Iterator[None]:
    """Turns an error into a sentence in `missing`, after `what`. Raises Untrusted for data that would run code."""
    try:
        yield
    except Untrusted:
        raise
    except (UserError, OSError) as e:
        missing.append(f"{what}: {e}")


def _evaluate(model: Trained, evals: Mapping[str, Images]) -> tuple[Section, ...]:
    programs = dataclasses.replace(model.programs, predicting=has_few_classes(model))
    explainer = functools.cache(lambda: explanations.build(model))  # built once
    sections: list[Section] = []
    for name, images in evals.items():
        log.info("evaluating %s (%d of %d): %d examples", name, len(sections) + 1, len(evals), len(images))
        evaluated, predictions = evaluate_set(model, programs, name, images)
        section = Section(name, evaluated)
        if evaluated.counts and isinstance(predictions, Predictions):
            reliability = bin_by_confidence(predictions.probabilities.max(1), predictions.ranks == 0)
            section = section._replace(reliability=reliability, risk=selective_risk(predictions))
            highest = highest_losses(predictions, max(1, TOP_LOSSES // len(evals)))
            if highest.size:
                method, explain = explainer()
                log.info("explaining %d examples by %s", len(highest), method)
                found = describe(programs, images, predictions, highest, explain)
                section = section._replace(top_losses=found, method=method)
        sections.append(section)
    return tuple(sections)


def label_losses(predictions: Predictions) -> np.ndarray:
    """The negative log-likelihood f64[n] of each label; nan without a label or a prediction."""
    log_odds = np.asarray(predictions.log_odds, np.float64)  # float32 rounds small probabilities to 0
    own = np.take_along_axis(log_odds, np.asarray(predictions.labels)[:, None], 1)[:, 0]
    return np.where((predictions.labels >= 0) & (predictions.predicted >= 0), np.logaddexp(0.0, -own), np.nan)


def highest_losses(predictions: Predictions, most: int) -> np.ndarray:
    """The indices int[m] of the `most` examples with the highest loss; ties are in set order."""
    losses = label_losses(predictions)
    order = np.argsort(-losses, kind="stable")[:most]
    return order[~np.isnan(losses[order])]


def describe(
    programs: Programs, images: Images, predictions: Predictions, indices: np.ndarray, explain: Explain
) -> tuple[TopLoss, ...]:
    """Reads and explains the examples at `indices` int[m] of a set, given the predictions for all of it.

    One call of `explain` computes the heatmaps of all predicted classes.
    """
    ids = indices.astype(np.int64)
    pixels = images.read(ids, ids)["image"]  # [m, h, w, c]
    augment = programs.recipe.augment(train=False)
    with programs.tracing():
        augmented = np.asarray(jax.jit(lambda x: augment(None, x))(pixels))
    shown = to_pixels(augmented, programs.recipe.config.augment)
    heats, found = explain(pixels, predictions.predicted[indices]), []
    for i, loss, image, heat in zip(indices, label_losses(predictions)[indices], shown, heats, strict=True):
        label, predicted, p = int(predictions.labels[i]), int(predictions.predicted[i]), predictions.probabilities[i]
        found.append(TopLoss(images.source.example_name(int(i)), label, predicted, float(p[predicted]),
                             float(p[label]), float(loss), image, heat))  # fmt: skip
    return tuple(found)
