"""Probes of features: simple classifiers on top of a frozen network."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from imgclf_jax.core.typing import JsonObject
from imgclf_jax.scores.multilabel import TargetPredictions

log = logging.getLogger(__name__)

SCORE = "mean_average_precision"  # of several labels, which have no accuracy
TEMPERATURE = 0.07  # of the neighbors' votes
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C of logistic regression, the inverse penalty
_FOLDS = 5
_MAX_TO_CHOOSE = 5_000  # examples in the cross-validation of C
_ITERATIONS = 1000
_FOR_THREADS = 1_000_000  # numbers


def nearest_neighbors(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, ks: Sequence[int], classes: int
) -> dict[int, np.ndarray]:
    """Returns {k: predicted classes int[m]} for test features f32[m, d], given training features f32[n, d], k ≤ n.

    The k training examples of the largest cosine similarity vote for their labels with weights exp(similarity / 0.07),
    as in Wu et al. 2018 (arXiv:1805.01978, section 3.4). Of classes with equal votes the first is predicted.
    """
    from sklearn.neighbors import NearestNeighbors

    distances, order = NearestNeighbors(n_neighbors=max(ks), metric="cosine").fit(train).kneighbors(test)  # [m, k]
    votes, out = np.exp((1 - distances) / TEMPERATURE), {}
    for k in ks:
        total = np.zeros((len(test), classes))
        np.add.at(total, (np.arange(len(test))[:, None], labels[order[:, :k]]), votes[:, :k])
        out[k] = total.argmax(1)
    return out


def choose_strength(train: np.ndarray, labels: np.ndarray) -> float:
    """Returns the best C of STRENGTHS in stratified five-fold cross-validation on the training set.

    At most 5,000 examples are used, drawn at random. C is 1 if these are of one class, or of classes of one example.
    """
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    drawn = np.sort(np.random.default_rng(0).permutation(len(labels))[:_MAX_TO_CHOOSE])
    counts = np.unique(labels[drawn], return_counts=True)[1]
    folds = min(_FOLDS, int(counts.max()))
    if len(counts) < 2 or folds < 2:
        return 1.0
    split = StratifiedKFold(folds, shuffle=True, random_state=0)
    # A fold may lack all examples of a rare class: its fit fails, and scores 0 with every C.
    search = GridSearchCV(_classifier(1.0), {"logisticregression__C": STRENGTHS}, cv=split, refit=False, error_score=0)
    with _fitting(train[drawn].size):
        search.fit(train[drawn], labels[drawn])
    return float(search.best_params_["logisticregression__C"])


def linear_probe(train: np.ndarray, labels: np.ndarray, strength: float) -> Any:
    """Fits scikit-learn's multinomial logistic regression to standardized features; returns it.

    The training features determine the standardization. `strength` is C. The log warns if 1,000 iterations of L-BFGS
    do not reach the optimum.
    """
    model = _classifier(strength)
    with _fitting(train.size):
        model.fit(train, labels)
    if model[-1].n_iter_.max() >= _ITERATIONS:
        log.warning(
            "the linear probe with C = %g stopped before its optimum, after %d iterations", strength, _ITERATIONS
        )
    return model


def one_vs_rest(train: np.ndarray, targets: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Fits a logistic regression per class; returns `decision(f32[m, d]) -> f64[m, classes]`.

    targets f32[n, classes], true from 0.5 on. `choose_strength` chooses each C. A class with only positive or only
    negative examples gets a constant.
    """
    models = []
    for positive in (targets >= 0.5).T:
        both = 0 < positive.sum() < len(positive)
        models.append(linear_probe(train, positive, choose_strength(train, positive)) if both else None)
    return lambda test: np.stack(
        [np.zeros(len(test)) if model is None else model.decision_function(test) for model in models], 1
    )


def probe_targets(
    train: np.ndarray, targets: np.ndarray, tests: dict[str, tuple[np.ndarray, np.ndarray]]
) -> Iterator[JsonObject]:
    """Yields the records of `probe` for targets f32[n, k], scored by mean average precision.

    A linear probe is logistic regression of each class by itself.
    """
    predict = one_vs_rest(train, targets)
    for name, (test, truth) in tests.items():
        found = predict(test)
        scores = TargetPredictions(truth, found, found).compute(np.ones((1, len(truth))))
        yield {"set": name, "method": "logistic regression", "score": SCORE, "scores": [float(scores[SCORE][0])]}


def _classifier(strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=_ITERATIONS))


@contextlib.contextmanager
def _fitting(numbers: int) -> Iterator[None]:
    """Silences scikit-learn's warnings, and limits small fits to one thread, which is ten times faster."""
    from threadpoolctl import threadpool_limits

    with warnings.catch_warnings(), threadpool_limits(1 if numbers < _FOR_THREADS else None):
        warnings.simplefilter("ignore")
        yield


def draw_few(labels: np.ndarray, shots: int, draw: int) -> np.ndarray:
    """Draws `shots` examples of each class without replacement; returns sorted indices. `draw` keys the draw."""
    rng = np.random.default_rng([0, shots, draw])
    chosen = [rng.choice(np.flatnonzero(labels == c), shots, replace=False) for c in np.unique(labels)]
    return np.sort(np.concatenate(chosen))
