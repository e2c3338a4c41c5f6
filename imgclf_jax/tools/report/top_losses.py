"""The examples with the highest loss that a report shows: the images, and heatmaps of the predicted class."""

import dataclasses

import jax
import numpy as np

from imgclf_jax.augment.ops import to_pixels
from imgclf_jax.data.stream import Images
from imgclf_jax.programs import Programs
from imgclf_jax.scores.classification import Predictions
from imgclf_jax.tools.explain.explanations import Explain


@dataclasses.dataclass(frozen=True, eq=False)
class TopLoss:
    """An example with a high loss, misclassified or not."""

    example: str  # its file or index
    label: int
    predicted: int
    probability: float  # of the predicted class
    label_probability: float
    loss: float  # the negative log-likelihood of the label
    image: np.ndarray  # f32[h, w, c] in [0, 1]: the model's input before normalization
    heat: np.ndarray  # [h', w']: a heatmap of the predicted class


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
    rows = zip(
        indices, label_losses(predictions)[indices], shown, explain(pixels, predictions.predicted[indices]), strict=True
    )
    found = []
    for i, loss, image, heat in rows:
        label, predicted, p = int(predictions.labels[i]), int(predictions.predicted[i]), predictions.probabilities[i]
        found.append(TopLoss(images.source.example_name(int(i)), label, predicted, float(p[predicted]),
                             float(p[label]), float(loss), image, heat))  # fmt: skip
    return tuple(found)
