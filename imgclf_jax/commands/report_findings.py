"""What a report says of a trained model: its evaluation sets, its worst mistakes, and what augmentation does."""

import dataclasses
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import metrics
from imgclf_jax.analysis import by_class
from imgclf_jax.analysis.scores import Reliability, reliability, with_intervals
from imgclf_jax.augment import ops
from imgclf_jax.augment.shown import as_pixels
from imgclf_jax.commands.evaluation import changed, evaluate, open_evals
from imgclf_jax.core import rng
from imgclf_jax.core.errors import Untrusted, UserError
from imgclf_jax.data import sources
from imgclf_jax.data.stream import Images, position_ids
from imgclf_jax.programs import Programs
from imgclf_jax.trained import Trained

log = logging.getLogger(__name__)

MISTAKES = 24  # of all sets, at most
_IMAGES, _DRAWS = 8, 4  # of augmentation
_MOST_BYTES = 64 << 20  # of a batch that is made to draw for its first images


@dataclasses.dataclass(frozen=True, eq=False)
class Mistake:
    """An example that is taken for another class."""

    example: str  # its file or number
    label: int
    predicted: int
    probability: float  # of the class that is predicted
    of_label: float  # of the class that it has
    image: np.ndarray  # f32[h, w, c] in [0, 1]: as the model is given it, but not normalized


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluated:
    """What is found on an evaluation set. Of several seeds, all but `metrics` is of the ensemble."""

    name: str
    metrics: dict[str, float]
    counts: dict[str, np.ndarray]  # see `by_class.counts`
    scores: dict[str, dict[str, float]]  # see `scores.with_intervals`; {} of very many classes, as what follows
    reliability: Reliability | None = None
    mistakes: tuple[Mistake, ...] = ()  # the most confident ones first
    wrong: int = 0  # how many there are


@dataclasses.dataclass(frozen=True, eq=False)
class Augmented:
    """Training images as they are, and as augmentation draws them."""

    names: tuple[str, ...]
    images: np.ndarray  # uint8[n, h, w, c], after the host ops of evaluation
    draws: np.ndarray  # f32[n, draws, h, w, c] in [0, 1]
    steps: tuple[int, ...]  # whose keys drew them
    whole_batch: bool  # whether these are the draws of the run, whose batch may be too large for this
    stretched: bool  # see `as_pixels`


@dataclasses.dataclass(frozen=True, eq=False)
class Findings:
    """All that needs the trained model or the data. What could not be found is said in `missing`, in sentences."""

    step: int | None = None  # of the checkpoint
    sets: tuple[Evaluated, ...] = ()
    augmented: Augmented | None = None
    missing: tuple[str, ...] = ()


def find(model: Trained, recorded: ConfigDict) -> Findings:
    """Evaluates a model on all of its sets. `recorded` is the config of its run, which the model's may go beyond.

    Where the data are gone, the findings say so. Raises Untrusted for data that would run code.
    """
    programs = model.programs
    try:
        base = sources.open_data(model.config)
    except Untrusted:
        raise
    except (UserError, OSError) as e:
        sentence = f"The data cannot be opened, so all that needs them is left out: {e}"
        log.warning("%s", sentence)
        return Findings(model.step, missing=(sentence,))
    missing = []
    if changed(programs, recorded, base):
        missing.append("The data have changed since training: examples trained on may now be in an evaluation set.")
    sets: tuple[Evaluated, ...] = ()
    try:
        sets = _evaluate(model, base)
    except Untrusted:
        raise
    except (UserError, OSError) as e:
        missing.append(f"The evaluation sets are left out: {e}")
    augmented = None
    try:
        augmented = draw(programs, sources.take_split(base, model.config.data.train))
    except Untrusted:
        raise
    except (UserError, OSError) as e:
        missing.append(f"What augmentation does is left out: {e}")
    for sentence in missing:
        log.warning("%s", sentence)
    return Findings(model.step, sets, augmented, tuple(missing))


def _evaluate(model: Trained, base: dict[str, sources.Source]) -> tuple[Evaluated, ...]:
    known = len(model.class_names) <= metrics.CONFUSION_CLASSES  # else the probabilities may not fit into memory
    programs = dataclasses.replace(model.programs, predicting=known)
    evals = open_evals(programs, base)
    found = []
    for name, images in evals.items():
        log.info("evaluating %s", name)
        sums, predictions = evaluate(programs, model.state, images)
        several = programs.recipe.num_seeds > 1
        one = Evaluated(
            name, metrics.summarize(sums, predictions, programs.recipe.whole_set_metrics),
            by_class.counts(sums, programs.recipe.num_seeds), {},
        )  # fmt: skip
        if known and predictions:
            labels, probabilities = predictions.labels, predictions.probabilities
            probabilities = probabilities[-1] if several else probabilities
            places = wrong_ones(labels, probabilities)
            most = max(1, MISTAKES // len(evals))
            one = dataclasses.replace(
                one, scores=with_intervals(labels, probabilities),
                reliability=reliability(labels, probabilities), wrong=len(places),
                mistakes=_mistakes(programs, images, labels, probabilities, places[:most]),
            )  # fmt: skip
        found.append(one)
    return tuple(found)


def wrong_ones(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """int[m]: the examples that are taken for another class, by the probability of that class, the greatest first.

    labels int[n], probabilities [n, classes]. Of equal ones the first example comes first; those with NaN are left out.
    """
    wrong = np.flatnonzero((probabilities.argmax(1) != labels) & ~np.isnan(probabilities).any(1))
    return wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")]


def _mistakes(
    programs: Programs, images: Images, labels: np.ndarray, probabilities: np.ndarray, places: np.ndarray
) -> tuple[Mistake, ...]:
    if not places.size:
        return ()
    read = images.read(places.astype(np.int64), places.astype(np.int64))["image"]
    augment = programs.recipe.augment(train=False)
    with programs.tracing():
        given = np.asarray(jax.jit(lambda x: augment(None, x))(read))
    pixels, _ = as_pixels(given, programs.recipe.config.augment)
    called = getattr(images.source, "name", "example {}".format)
    return tuple(
        Mistake(called(int(place)), int(labels[place]), int(own.argmax()), float(own.max()),
                float(own[labels[place]]), image)
        for place, own, image in zip(places, probabilities[places], pixels, strict=True)
    )  # fmt: skip


def draw(programs: Programs, source: Any) -> Augmented | None:
    """The first images of the run's first batch, as they are and as augmentation draws them; None if nothing is drawn.

    A draw has the keys of a step: host ops those of its stream positions, device ops that of the step. The first draw
    is what step 0 trains on. The others are of the first steps of the epochs after it, for the same images.
    """
    config, recipe = programs.recipe.config, programs.recipe
    n, b = len(source), int(config.batch_size)
    drawn = Images(source, config.preprocess, config.seed, config.data.threads)
    if not drawn.random and not ops.draws(config.augment):
        return None
    augment = recipe.augment(train=True)
    count = min(_IMAGES, b, n)
    rows = min(b, max(count, _MOST_BYTES // math.prod(drawn.shape)))
    ids = position_ids(config.seed, np.arange(count, dtype=np.int64), n)
    steps = tuple(-(-epoch * n // b) for epoch in range(_DRAWS))

    @jax.jit
    def augmented(step: Any, batch: Any, ids: Any, epochs: Any) -> Any:
        known = (jnp.uint32(config.seed), ids, epochs) if recipe.with_ids else ()
        return augment(rng.key(jnp.uint32(config.seed), "augment", step), batch, *known)[:count]

    found = []
    for step in steps:
        positions = step * b + np.arange(count, dtype=np.int64)
        batch = np.zeros((rows, *drawn.shape), np.uint8)  # draws may depend on how many images there are
        batch[:count] = drawn.read(ids, positions)["image"]
        own, epochs = np.zeros((2, rows), np.int32)
        own[:count], epochs[:count] = ids, positions // n
        with programs.tracing():
            found.append(np.asarray(augmented(np.int32(step), batch, own, epochs)))
    pixels, stretched = as_pixels(np.stack(found, 1), config.augment)
    called = getattr(source, "name", "example {}".format)
    return Augmented(
        tuple(called(int(i)) for i in ids), programs.eval_images(source).read(ids, ids)["image"], pixels, steps,
        rows == b, stretched,
    )  # fmt: skip
