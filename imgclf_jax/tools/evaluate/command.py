"""The command `evaluate`: metrics and scores of a trained model on each of its evaluation sets."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from imgclf_jax import datasets
from imgclf_jax.core import processes
from imgclf_jax.core.errors import UsageError, UserError
from imgclf_jax.core.terminal import format_metrics, print_json, print_table, print_text
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.losses import Task
from imgclf_jax.methods.table import build_attack
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.evaluate import attacked, by_class, calibrated, corrupted, listing
from imgclf_jax.tools.evaluate import ood as out_of_distribution
from imgclf_jax.tools.evaluate.changes import compare_with_record
from imgclf_jax.tools.evaluate.evaluated import Evaluated, evaluate_set, has_few_classes
from imgclf_jax.tools.evaluate.intervals import table
from imgclf_jax.train.evaluation import open_evals
from imgclf_jax.train.leakage import initial_warnings
from imgclf_jax.trained import load_converted, restore

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
    asked = [flag for flag, value in (*instead.items(), ("--predictions", predictions)) if value]
    if len(asked) > 1:
        raise UsageError(f"{' and '.join(asked)} print different things: pass one of them")
    if predictions and Path(predictions).suffix not in (".csv", ".jsonl"):
        raise UsageError(f"--predictions={predictions}: the name must end in .csv or .jsonl")
    perturb = build_attack(attack) if attack else None
    kinds = corrupted.parse(corruptions) if corruptions else []
    restored = restore(config, workdir, checkpoint) if workdir else None
    base = datasets.open_data(config)
    model = restored or load_converted(config, base)
    programs = model.programs
    method = programs.recipe.method
    if asked or not method.evaluate:
        programs.check_predicts()
    if any(instead.values()) and programs.recipe.task is Task.MULTILABEL:
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
    predicting = method.predicts and (has_few_classes(model) or bool(predictions))
    programs = dataclasses.replace(programs, predicting=predicting)
    found, rows = dict[str, Evaluated](), list[JsonObject]()
    for name, images in evals.items():
        found[name], predicted = evaluate_set(model, programs, name, images)
        if predictions and predicted is not None:
            examples = [images.source.listed_name(i) for i in range(len(images))]
            rows += listing.rows(name, examples, predicted, model.class_names, top_k, model.step)
    if processes.index():
        return 0
    if predictions:
        listing.write(Path(predictions), rows)
        log.info("wrote the predictions for %d examples to %s", len(rows), predictions)
    if format == "json":
        print_json({"step": model.step, **{name: _as_json(one, model.class_names) for name, one in found.items()}})
        return 0
    for name, one in found.items():
        _print(name, one, model.class_names, programs.recipe.task)
    return 0


def _as_json(one: Evaluated, names: Sequence[str]) -> JsonObject:
    out: JsonObject = dict(one.metrics) | ({"scores": one.scores} if one.scores else {})
    if one.counts:
        out |= {"class_names": list(names), "confusion": one.counts["confusion"].tolist()}
    if one.multilabel:
        out |= {"class_names": list(names), "classes": by_class.multilabel(one.multilabel, names)}
    return out


def _print(name: str, one: Evaluated, names: Sequence[str], task: Task) -> None:
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
