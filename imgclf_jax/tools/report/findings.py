"""What a report says of a trained model: its evaluation sets, its worst mistakes, and what augmentation does."""

import dataclasses
import functools
import logging
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import metrics
from imgclf_jax.core.errors import Untrusted, UserError
from imgclf_jax.data import sources
from imgclf_jax.data.stream import Images
from imgclf_jax.scores.classification import Reliability, reliability, with_bootstrap, with_intervals
from imgclf_jax.scores.multilabel import MultilabelScores
from imgclf_jax.scores.regression import RegressionScores
from imgclf_jax.tools.evaluate import by_class
from imgclf_jax.tools.explain import explanations
from imgclf_jax.tools.report import augmentation as report_augmentation
from imgclf_jax.tools.report import mistakes as report_mistakes
from imgclf_jax.tools.report.augmentation import Augmented
from imgclf_jax.tools.report.mistakes import Mistake
from imgclf_jax.train.evaluation import changed, changed_sets, evaluate, open_evals
from imgclf_jax.trained import Trained

log = logging.getLogger(__name__)

MISTAKES = 24  # of all sets, at most


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
    method: str = ""  # by which the mistakes are explained: see `explanations`
    of_targets: MultilabelScores | RegressionScores | None = None  # of several labels, and of numbers


@dataclasses.dataclass(frozen=True, eq=False)
class Findings:
    """All that needs the trained model or the data. What could not be found is said in `missing`, in sentences."""

    step: int | None = None  # of the checkpoint
    sets: tuple[Evaluated, ...] = ()
    augmented: Augmented | None = None
    missing: tuple[str, ...] = ()


def find(model: Trained, recorded: ConfigDict, fingerprints: Mapping[str, str] | None = None) -> Findings:
    """Evaluates a model on all of its sets. `recorded` is the config of its run, which the model's may go beyond.

    `fingerprints` are those of the evaluation sets that the run has recorded, by name. Where the data are gone, the
    findings say so. Raises Untrusted for data that would run code.
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
        evals = open_evals(programs, base)
        missing += [f"The evaluation set {name} has changed since training: its metrics are not those of the curves."
                    for name in changed_sets(programs, recorded, fingerprints or {}, evals)]  # fmt: skip
        sets = _evaluate(model, evals)
    except Untrusted:
        raise
    except (UserError, OSError) as e:
        missing.append(f"The evaluation sets are left out: {e}")
    augmented = None
    try:
        augmented = report_augmentation.draw(programs, sources.take_split(base, model.config.data.train))
    except Untrusted:
        raise
    except (UserError, OSError) as e:
        missing.append(f"What augmentation does is left out: {e}")
    for sentence in missing:
        log.warning("%s", sentence)
    return Findings(model.step, sets, augmented, tuple(missing))


def _evaluate(model: Trained, evals: Mapping[str, Images]) -> tuple[Evaluated, ...]:
    known = len(model.class_names) <= metrics.CONFUSION_CLASSES  # else the probabilities may not fit into memory
    programs = dataclasses.replace(model.programs, predicting=known)
    explainer = functools.cache(lambda: explanations.build(model))  # for all sets, if there is a mistake
    found = []
    for name, images in evals.items():
        log.info("evaluating %s", name)
        sums, predictions = evaluate(programs, model.state, images)
        several = programs.recipe.num_seeds > 1
        one = Evaluated(
            name, metrics.summarize(sums, predictions, programs.recipe.whole_set_metrics),
            by_class.counts(sums, programs.recipe.num_seeds), {},
        )  # fmt: skip
        if known and isinstance(predictions, metrics.Predictions):
            own = predictions.for_seed(-1) if several else predictions
            places = report_mistakes.wrong_ones(own)
            given = own.labels, own.probabilities, own.from_logits
            one = dataclasses.replace(
                one, scores=with_intervals(*given), reliability=reliability(*given), wrong=len(places),
            )  # fmt: skip
            if places.size:
                method, explain = explainer()
                places = places[: max(1, MISTAKES // len(evals))]
                log.info("explaining %d mistakes by %s", len(places), method)
                mistakes = report_mistakes.look_at(programs, images, own, places, explain)
                one = dataclasses.replace(one, mistakes=mistakes, method=method)
        elif isinstance(predictions, metrics.TargetPredictions):
            own_targets = predictions.for_seed(-1) if several else predictions
            of = metrics.target_scores(model.task, own_targets, model.class_names)
            intervals = with_bootstrap(of.compute, len(images), own_targets.targets.size)
            one = dataclasses.replace(one, scores=intervals, of_targets=of)
        found.append(one)
    return tuple(found)
