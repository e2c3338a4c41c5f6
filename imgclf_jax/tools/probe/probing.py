"""Probes of features: simple classifiers on top of a frozen network."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from imgclf_jax.core.typing import JsonObject
from imgclf_jax.losses import SIGMOID, Task, link_of
from imgclf_jax.scores.multilabel import TargetPredictions

log = logging.getLogger(__name__)

SCORES = {Task.MULTILABEL: "mean_average_precision"}  # for the task without accuracy
TEMPERATURE = 0.07  # of the neighbors' votes
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C of logistic regression, the inverse penalty
_FOLDS = 5
_MAX_TO_CHOOSE = 5_000  # examples in the cross-validation of C
_CHUNK = 1 << 23  # similarities in memory at once
_ITERATIONS = 1000
_FOR_THREADS = 1_000_000  # numbers


def nearest_neighbors(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, ks: Sequence[int], classes: int
) -> dict[int, np.ndarray]:
    """Returns {k: predicted classes int[m]} for test features f32[m, d], given training features f32[n, d], k ≤ n.

    The k training examples of the largest cosine similarity vote for their labels with weights exp(similarity / 0.07),
    as in Wu et al. 2018 (arXiv:1805.01978, section 3.4). Ties go to the first example and the first class.
    """
    from sklearn.preprocessing import normalize

    keys, queries = normalize(train), normalize(test)  # rows of zeros stay zero
    out = {k: np.empty(len(test), np.int64) for k in ks}
    rows = max(1, _CHUNK // len(train))
    for first in range(0, len(test), rows):
        similarity = queries[first : first + rows] @ keys.T  # [rows, n]
        order = np.asarray(jax.lax.top_k(similarity, max(ks))[1])  # [rows, k]; of equal values the first
        votes = np.exp(np.take_along_axis(similarity, order, 1).astype(np.float64) / TEMPERATURE)
        for k in ks:
            total = np.zeros((len(order), classes))
            np.add.at(total, (np.arange(len(order))[:, None], labels[order[:, :k]]), votes[:, :k])
            out[k][first : first + rows] = total.argmax(1)
    return out


def choose_strength(train: np.ndarray, labels: np.ndarray) -> float:
    """Returns the best C of STRENGTHS in five-fold cross-validation on the training set; ties go to the smallest.

    Folds are stratified. At most 5,000 examples are used: up to five of each class, drawn at random, and others drawn
    from all the rest. If five of each are more than that, they are of as many classes, in random order, as fit. A class
    with a single example is not used, and one with fewer than five reduces the number of folds. If fewer than two
    classes have two examples, C is 1, and the log says so.
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    drawn = _draw_to_choose(labels)
    train, labels = train[drawn], labels[drawn]
    counts = np.unique(labels, return_counts=True)[1]
    if len(counts) < 2:
        log.info("using C = 1, because cross-validation needs two classes with at least two training images each")
        return 1.0
    folds = min(_FOLDS, int(counts.min()))
    split = StratifiedKFold(folds, shuffle=True, random_state=0)
    with _fitting(train.size):
        means = [cross_val_score(_classifier(c), train, labels, cv=split).mean() for c in STRENGTHS]
    return STRENGTHS[int(np.argmax(means))]


def _draw_to_choose(labels: np.ndarray) -> np.ndarray:
    """Draws the examples of `choose_strength` from labels [n] of any kind; returns sorted indices."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    usable = np.flatnonzero(counts[inverse] > 1)
    if len(usable) <= _MAX_TO_CHOOSE:
        return usable
    rng = np.random.default_rng([0, 0])
    shuffled = rng.permutation(usable)
    by_class = shuffled[np.argsort(inverse[shuffled], kind="stable")]
    few = [members[:_FOLDS] for members in np.split(by_class, np.cumsum(counts[counts > 1])[:-1])]
    order = rng.permutation(len(few))
    fitting = order[np.cumsum([len(few[c]) for c in order]) <= _MAX_TO_CHOOSE]
    drawn = np.concatenate([few[c] for c in fitting])
    if len(fitting) == len(few):
        others = np.setdiff1d(usable, drawn)
        drawn = np.concatenate([drawn, rng.choice(others, _MAX_TO_CHOOSE - len(drawn), replace=False)])
    return np.sort(drawn)


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


def ranks_by_logits(task: Task, loss: str) -> bool:
    """Whether the head's logits determine the task's score, which a user's own link may prevent."""
    return task not in SCORES or link_of(loss) == SIGMOID


def probe_targets(
    train: np.ndarray, targets: np.ndarray, tests: dict[str, tuple[np.ndarray, np.ndarray]],
    head: tuple[np.ndarray, np.ndarray] | None = None,
) -> Iterator[JsonObject]:  # fmt: skip
    """The records of `probe` for targets f32[n, k], scored by mean average precision.

    A linear probe is logistic regression of each class by itself.
    """
    predict = one_vs_rest(train, targets)

    def score(found: np.ndarray, truth: np.ndarray) -> float:
        scores = TargetPredictions(truth, found, found).compute(np.ones((1, len(truth))))
        return float(scores[SCORES[Task.MULTILABEL]][0])

    for name, (test, truth) in tests.items():
        if head:
            own = test.astype(np.float64) @ head[0] + head[1]
            yield {"set": name, "method": "own head", "accuracies": [score(own, truth)]}
        yield {"set": name, "method": "logistic regression", "accuracies": [score(predict(test), truth)]}


def _classifier(strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=_ITERATIONS))


@contextlib.contextmanager
def _fitting(numbers: int) -> Iterator[None]:
    """Silences scikit-learn's convergence warnings, and limits small fits to one thread, which is ten times faster."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with warnings.catch_warnings(), threadpool_limits(1 if numbers < _FOR_THREADS else None):
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def draw_few(labels: np.ndarray, shots: int, draw: int) -> np.ndarray:
    """Draws `shots` examples of each class without replacement; returns sorted indices. `draw` keys the draw."""
    rng = np.random.default_rng([0, shots, draw])
    chosen = [rng.choice(np.flatnonzero(labels == c), shots, replace=False) for c in np.unique(labels)]
    return np.sort(np.concatenate(chosen))
