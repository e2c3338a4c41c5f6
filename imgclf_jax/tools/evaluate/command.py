"""The command `evaluate`: metrics and scores of a trained model on each of its evaluation sets."""

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import datasets, metrics
from imgclf_jax.core import processes
from imgclf_jax.core.errors import UsageError, UserError
from imgclf_jax.core.terminal import format_metrics, print_json, print_table, print_text
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.data import stream
from imgclf_jax.losses import Task
from imgclf_jax.methods.table import build_attack
from imgclf_jax.programs import Programs
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.scores.classification import Predictions
from imgclf_jax.scores.multilabel import TargetPredictions
from imgclf_jax.tools.evaluate import attacked, by_class, calibrated, corrupted, listing
from imgclf_jax.tools.evaluate import ood as out_of_distribution
from imgclf_jax.tools.evaluate.changes import compare_with_record
from imgclf_jax.tools.evaluate.intervals import table, with_intervals
from imgclf_jax.train.evaluation import evaluate, open_evals
from imgclf_jax.train.leakage import initial_warnings
from imgclf_jax.trained import Trained, load_converted, restore

log = logging.getLogger(__name__)


def main(
    config: ConfigDict, workdir: Workdir | None, checkpoint: str, format: str, predictions: str = "", top_k: int = 3,
    corruptions: str = "", attack: str = "", calibrate: str = "", ood: str = "",
) -> int:  # fmt: skip
    """Prints the metrics of each evaluation set, its scores, and a table of its classes.

    Scores and predictions of several seeds are those of their ensemble. The format "json" prints one object: the
    `step`, and for each set its metrics, its `scores` with 95 % confidence intervals, its `class_names` and, in their
    order, its `confusion`, [label][prediction], unless there are more than CONFUSION_CLASSES classes. A multi-label set
    has `classes` (see `by_class.multilabel`).

    - `workdir` is the run to evaluate; None evaluates the weights that `init_from` names.
    - `predictions` is a file for the `top_k` classes of each example, or "".
    - `corruptions`, "all" or names, prints the accuracy on corrupted images instead (see `corrupted`).
    - `attack` prints the accuracy on adversarial examples instead (see `attacked`).
    - `calibrate` fits a calibration instead (see `calibrated`), and `ood` names images of another kind (see `ood`).
    """
    instead = {"--corruptions": corruptions, "--attack": attack, "--calibrate": calibrate, "--ood": ood}
    asked = [flag for flag, value in instead.items() if value]
    if len(asked) > 1 or (asked and predictions):
        raise UsageError(f"{' and '.join([*asked, *['--predictions'] * bool(predictions)])} print different things: "
                         "pass one of them")  # fmt: skip
    if predictions and Path(predictions).suffix not in (".csv", ".jsonl"):
        raise UsageError(f"--predictions={predictions}: the name must end in .csv or .jsonl")
    perturb = build_attack(attack) if attack else None
    kinds = corrupted.parse(corruptions) if corruptions else []
    restored = restore(config, workdir, checkpoint) if workdir else None
    base = datasets.open_data(config)
    model = restored or load_converted(config, base)
    programs = model.programs
    method = programs.recipe.method
    if predictions or asked or not method.evaluate:
        programs.check_predicts()
    if asked and programs.recipe.task is Task.MULTILABEL:
        raise UserError(
            f"{asked[0]} is for one class per image, but this run has several labels; evaluate it without {asked[0]}"
        )
    evals = open_evals(programs, base)
    if workdir:
        compare_with_record(programs, workdir, base, evals)
    for sentence in () if workdir else initial_warnings(config, base):
        log.warning("%s", sentence)
    if (calibrate or ood) and processes.count() > 1:
        raise UserError(f"{asked[0]} runs in a single process; pass --num_processes=1")
    if calibrate:
        return calibrated.report(model, calibrated.check(config, workdir, base), evals, calibrate, format)
    if ood:
        return out_of_distribution.report(model, base, evals, ood, format)
    if perturb:
        return attacked.report(model, evals, attack, perturb, format)
    if kinds:
        return corrupted.report(model, evals, kinds, format)
    few_classes = len(model.class_names) <= metrics.CONFUSION_CLASSES
    programs = dataclasses.replace(programs, predicting=method.predicts and (few_classes or bool(predictions)))
    found = {name: _evaluate(programs, model, name, images, top_k if predictions else 0)
             for name, images in evals.items()}  # fmt: skip
    if processes.index():
        return 0
    if predictions:
        rows = [row for one in found.values() for row in one.rows]
        listing.write(Path(predictions), rows)
        log.info("wrote the predictions for %d examples to %s", len(rows), predictions)
    if format == "json":
        print_json({"step": model.step, **{name: _as_json(one, model.class_names) for name, one in found.items()}})
        return 0
    for name, one in found.items():
        _print(name, one, model.class_names, programs.recipe.task)
    return 0


@dataclasses.dataclass
class _Evaluated:
    """The evaluation of a set; with several seeds, everything but `metrics` is of the ensemble."""

    metrics: dict[str, float]
    counts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # see `by_class.counts`; or {}
    scores: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    multilabel: TargetPredictions | None = None
    rows: list[JsonObject] = dataclasses.field(default_factory=list)  # of the predictions' file


def _evaluate(programs: Programs, model: Trained, name: str, images: stream.Images, top_k: int) -> _Evaluated:
    """Evaluates a set, with rows of the `top_k` classes of each example unless that is 0."""
    several, names = programs.recipe.config.num_seeds > 1, model.class_names
    sums, predicted = evaluate(programs, model.state, images, caption=f"evaluating {name}")
    out = _Evaluated(metrics.summarize(sums, predicted, programs.recipe.whole_set_metrics))
    if predicted is None or processes.index():
        return out
    if several and isinstance(predicted, Predictions):
        pairs = itertools.combinations(predicted.predicted[:-1], 2)
        out.metrics["disagreement"] = float(np.mean([np.mean(a != b) for a, b in pairs]))  # of two seeds' classes
    predicted = predicted.for_seed(-1) if several else predicted
    examples = [images.source.listed_name(i) for i in range(len(images))] if top_k else []
    if isinstance(predicted, TargetPredictions):
        out.multilabel = predicted
        out.rows += listing.target_rows(name, examples, predicted, names, model.step)
    elif top_k:
        out.rows += listing.rows(name, examples, predicted, names, min(top_k, len(names)), model.step)
    if isinstance(predicted, Predictions) and len(names) <= metrics.CONFUSION_CLASSES:
        out.counts = by_class.counts(predicted)
    if out.multilabel or out.counts:
        out.scores = with_intervals(predicted.compute, len(images), len(names))
    return out


def _as_json(one: _Evaluated, names: Sequence[str]) -> JsonObject:
    out: JsonObject = dict(one.metrics) | ({"scores": one.scores} if one.scores else {})
    if one.counts:
        out |= {"class_names": list(names), "confusion": one.counts["confusion"].tolist()}
    if one.multilabel:
        out |= {"class_names": list(names), "classes": by_class.multilabel(one.multilabel, names)}
    return out


def _print(name: str, one: _Evaluated, names: Sequence[str], task: Task) -> None:
    print_text(f"{name}: {format_metrics(one.metrics)}")
    if one.scores:
        print_table(*table(one.scores))
    if one.multilabel:
        print_table(*by_class.multilabel_table(one.multilabel, names))
        print_text(by_class.THRESHOLD_NOTE)
    if one.counts:
        print_table(*by_class.table(names, one.counts))
        if task is Task.SOFT:
            print_text("Each label is the class of the largest weight in the target; only loss, nll and kl use the "
                       "whole target.")  # fmt: skip
