"""The mistakes of a trained model that a report shows: the images, and where the wrong class is found in them."""

import dataclasses

import jax
import numpy as np

from imgclf_jax.data.stream import Images
from imgclf_jax.metrics import Predictions
from imgclf_jax.programs import Programs
from imgclf_jax.tools.explain.explanations import Explain
from imgclf_jax.tools.pages.shown import as_pixels


@dataclasses.dataclass(frozen=True, eq=False)
class Mistake:
    """An example that is taken for another class."""

    example: str  # its file or number
    label: int
    predicted: int
    probability: float  # of the class that is predicted
    of_label: float  # of the class that it has
    image: np.ndarray  # f32[h, w, c] in [0, 1]: as the model is given it, but not normalized
    heat: np.ndarray  # [h', w'], where in it the class that is predicted is found


def wrong_ones(found: Predictions) -> np.ndarray:
    """int[m]: the examples that are taken for another class, by the probability of that class, the greatest first.

    Of equal ones the first example comes first. Those without a prediction are left out.
    """
    wrong = np.flatnonzero((found.ranks > 0) & (found.predicted >= 0))
    return wrong[np.argsort(-found.probabilities[wrong].max(1), kind="stable")]


def look_at(
    programs: Programs, images: Images, found: Predictions, places: np.ndarray, explain: Explain
) -> tuple[Mistake, ...]:
    """The examples at `places` int[m] of a set, of which all predictions are given.

    `explain` gives the maps of all of them in one call, for the classes that are predicted.
    """
    ids = places.astype(np.int64)
    read = images.read(ids, ids)["image"]  # [m, h, w, c]
    augment = programs.recipe.augment(train=False)
    with programs.tracing():
        given = np.asarray(jax.jit(lambda x: augment(None, x))(read))
    pixels, _ = as_pixels(given, programs.recipe.config.augment)
    heats = explain(read, found.predicted[places])
    called = getattr(images.source, "name", "example {}".format)
    return tuple(
        Mistake(called(int(place)), int(label), int(predicted), float(own[predicted]), float(own[label]), image, heat)
        for place, label, predicted, own, image, heat in zip(
            places, found.labels[places], found.predicted[places], found.probabilities[places], pixels, heats,
            strict=True,
        )
    )  # fmt: skip
