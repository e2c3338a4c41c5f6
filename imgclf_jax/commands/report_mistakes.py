"""The mistakes of a trained model that a report shows: the images, and where the wrong class is found in them."""

import dataclasses

import jax
import numpy as np

from imgclf_jax.augment.shown import as_pixels
from imgclf_jax.commands.explanations import Explain
from imgclf_jax.data.stream import Images
from imgclf_jax.programs import Programs


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


def wrong_ones(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """int[m]: the examples that are taken for another class, by the probability of that class, the greatest first.

    labels int[n], probabilities [n, classes]. Of equal ones the first example comes first; those with NaN are left out.
    """
    wrong = np.flatnonzero((probabilities.argmax(1) != labels) & ~np.isnan(probabilities).any(1))
    return wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")]


def look_at(
    programs: Programs, images: Images, labels: np.ndarray, probabilities: np.ndarray, places: np.ndarray,
    explain: Explain,
) -> tuple[Mistake, ...]:  # fmt: skip
    """The examples at `places` int[m] of a set, whose `labels` int[n] and `probabilities` [n, classes] are given.

    `explain` gives the maps of all of them in one call, for the classes that are predicted.
    """
    ids = places.astype(np.int64)
    read = images.read(ids, ids)["image"]  # [m, h, w, c]
    augment = programs.recipe.augment(train=False)
    with programs.tracing():
        given = np.asarray(jax.jit(lambda x: augment(None, x))(read))
    pixels, _ = as_pixels(given, programs.recipe.config.augment)
    heats = explain(read, probabilities[places].argmax(1))
    called = getattr(images.source, "name", "example {}".format)
    return tuple(
        Mistake(called(int(place)), int(labels[place]), int(own.argmax()), float(own.max()),
                float(own[labels[place]]), image, heat)
        for place, own, image, heat in zip(places, probabilities[places], pixels, heats, strict=True)
    )  # fmt: skip
