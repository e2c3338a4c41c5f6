"""`evaluate --ood`: how well scores of a trained model tell other images from those of its evaluation sets.

Scores and measures are those of OpenOOD v1.5 (Zhang et al. 2023, arXiv:2306.09301): other images are the positives.
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from imgclf_jax import datasets
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.terminal import print_json, print_table, print_text, showing
from imgclf_jax.data import sources, stream
from imgclf_jax.data.source import Source, read_examples
from imgclf_jax.scores.classification import roc_area
from imgclf_jax.tools.evaluate import intervals, outputs
from imgclf_jax.tools.pages import inputs
from imgclf_jax.trained import ImageLike, Trained

_NEIGHBORS = 50


def report(model: Trained, base: dict[str, Source], evals: Mapping[str, stream.Images], text: str, format: str) -> int:
    """Prints the measures of each score, for each evaluation set against the images that `text` names.

    A score of several seeds is the mean of theirs. The format "json" prints one object: the `step`, how many `other`
    images there are, and for each set {"MEASURE, SCORE": {"value", "low", "high"}}.
    """
    with showing("computing features"):
        features, labels = outputs.training_features(model, base)
        fitted = [fit(own, labels if labels.ndim == 1 else labels.argmax(1)) for own in features]
        others = [np.reshape(out, (len(fitted), -1, out.shape[-1]))
                  for out in (model.logits(_open(model, text)), model.features(_open(model, text)))]  # fmt: skip
        sets = {name: [outputs.compute(model, images, what)[0] for what in ("logits", "features")]
                for name, images in evals.items()}  # fmt: skip

    def scores(logits: np.ndarray, features: np.ndarray) -> dict[str, np.ndarray]:
        found = [score(*own) for score, *own in zip(fitted, logits, features, strict=True)]
        return {name: np.mean([one[name] for one in found], 0) for name in found[0]}

    away, results = scores(*others), {}
    for name, given in sets.items():
        n = len(evals[name])
        is_other = np.repeat([False, True], [n, others[0].shape[1]])
        joined = {score: np.append(own, away[score]) for score, own in scores(*given).items()}
        each = {score: intervals.with_intervals(functools.partial(measure, values, is_other), len(is_other), 1, n)
                for score, values in joined.items()}  # fmt: skip
        results[name] = {f"{kind}, {score}": each[score][kind] for kind in ("AUROC", "FPR95", "AUPR") for score in each}
    if format == "json":
        print_json({"step": model.step, "other": others[0].shape[1], **results})
        return 0
    for name, found in results.items():
        print_text(f"{name}: {len(evals[name])} examples against {others[0].shape[1]} of {text}")
        print_table(*intervals.table(found))
    return 0


def _open(model: Trained, text: str) -> Iterator[ImageLike]:
    """Yields the images of a folder, a file, or a source and its split. Raises UserError if there are none."""
    spec, split = datasets.split_source(text)
    if os.path.exists(text):
        inputs.check([text])
        yield from inputs.find([text])
    elif not spec:
        raise UserError(f"--ood={text}: there is no such file or folder; name one with images, or a source and its "
                        "split, such as \"arrays('other.npz')/test\"")  # fmt: skip
    else:
        opened = datasets.open_data(model.config, spec)
        source = sources.take_split(opened, split or ("test" if "test" in opened else next(iter(opened))))
        for ids in itertools.batched(range(source.size), 256):
            yield from read_examples(source, np.array(ids))["image"]


def fit(train: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]:
    """Returns `score(logits [n, classes], features [n, d]) -> {name: f64[n]}`, greater for images as in training.

    The features f32[m, d] and labels i32[m] of training determine the Mahalanobis distance to the nearest class mean
    (Lee et al. 2018, arXiv:1807.03888) and the distance to the 50th neighbor (Sun et al. 2022, arXiv:2204.06507). The
    others are the maximum softmax (Hendrycks and Gimpel 2017, arXiv:1610.02136) and logit (Hendrycks et al. 2022,
    arXiv:1911.11132), and the energy (Liu et al. 2020, arXiv:2010.03759).
    """
    from scipy.special import logsumexp
    from sklearn.covariance import EmpiricalCovariance
    from sklearn.neighbors import NearestNeighbors
    from sklearn.preprocessing import normalize

    train = train.astype(np.float64)
    classes, which = np.unique(labels, return_inverse=True)
    means = np.stack([train[labels == c].mean(0) for c in classes])
    precision = EmpiricalCovariance().fit(train - means[which]).precision_
    neighbors = NearestNeighbors(n_neighbors=min(_NEIGHBORS, len(train))).fit(normalize(train))

    def score(logits: np.ndarray, features: np.ndarray) -> dict[str, np.ndarray]:
        logits, features = logits.astype(np.float64), features.astype(np.float64)
        energy, apart = logsumexp(logits, 1), (features - mean for mean in means)
        return {"maximum softmax": np.exp(logits.max(1) - energy), "maximum logit": logits.max(1), "energy": energy,
                "Mahalanobis": -np.min([((x @ precision) * x).sum(1) for x in apart], 0),
                "nearest neighbors": -neighbors.kneighbors(normalize(features))[0][:, -1]}  # fmt: skip

    return score


def measure(values: np.ndarray, is_other: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """{measure: f64[r]} of scores f64[n] for example weights f64[r, n]; "FPR95" is the FPR at a TPR of 0.95."""
    order = np.argsort(values, kind="stable")
    last = np.append(np.diff(values[order]) > 0, True)  # of equal values
    true, false = (np.cumsum(weights[:, order] * kind[order], 1)[:, last] for kind in (is_other, ~is_other))
    recall, chosen = true / true[:, -1:], true + false
    first = np.argmax(recall >= 0.95, 1)[:, None]
    precision = np.divide(true, chosen, out=np.ones_like(true), where=chosen > 0)
    y, x = (np.pad(z, ((0, 0), (1, 0)), constant_values=at) for z, at in ((precision, 1), (recall, 0)))
    return {"AUROC": roc_area(-values, is_other, weights), "AUPR": np.trapezoid(y, x, axis=1),
            "FPR95": np.take_along_axis(false / false[:, -1:], first, 1)[:, 0]}  # fmt: skip
