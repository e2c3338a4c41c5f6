"""The mistakes that a report shows: the images, and heatmaps of the wrongly predicted class."""

import dataclasses

import jax
import numpy as np

from imgclf_jax.data.stream import Images
from imgclf_jax.metrics import Predictions
from imgclf_jax.programs import Programs
from imgclf_jax.tools.explain.explanations import Explain
from imgclf_jax.tools.pages.shown import to_pixels


@dataclasses.dataclass(frozen=True, eq=False)
class Mistake:
    """A misclassified example."""

    example: str  # its file or index
    label: int
    predicted: int
    probability: float  # of the predicted class
    label_probability: float
    image: np.ndarray  # f32[h, w, c] in [0, 1]: the model's input before normalization
    heat: np.ndarray  # [h', w']: a heatmap of the predicted class


def find(predictions: Predictions) -> np.ndarray:
    """Returns the indices int[m] of misclassified examples, the most confident first; ties are in set order.

    Examples without a prediction are skipped.
    """
    wrong = np.flatnonzero((predictions.ranks > 0) & (predictions.predicted >= 0))
    return wrong[np.argsort(-predictions.probabilities[wrong].max(1), kind="stable")]


def describe(
    programs: Programs, images: Images, predictions: Predictions, indices: np.ndarray, explain: Explain
) -> tuple[Mistake, ...]:
    """Reads and explains the examples at `indices` int[m] of a set, given the predictions for all of it.

    One call of `explain` computes the heatmaps of all predicted classes.
    """
    ids = indices.astype(np.int64)
    pixels = images.read(ids, ids)["image"]  # [m, h, w, c]
    augment = programs.recipe.augment(train=False)
    with programs.tracing():
        augmented = np.asarray(jax.jit(lambda x: augment(None, x))(pixels))
    shown, _ = to_pixels(augmented, programs.recipe.config.augment)
    arrays = predictions.labels, predictions.predicted, predictions.probabilities
    labels, predicted, probabilities = (x[indices] for x in arrays)
    example_name = getattr(images.source, "name", "example {}".format)
    return tuple(
        Mistake(example_name(int(i)), int(label), int(other), float(p[other]), float(p[label]), image, heat)
        for i, label, other, p, image, heat in zip(
            indices, labels, predicted, probabilities, shown, explain(pixels, predicted), strict=True
        )
    )
