"""The command `evaluate`: metrics and scores of a trained model on each of its evaluation sets."""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import datasets, metrics
from imgclf_jax.core import processes
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.terminal import format_metrics, print_json, print_table, print_text
from imgclf_jax.core.text import decimals, interval
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.losses import Task
from imgclf_jax.methods.table import build_attack
from imgclf_jax.programs import Programs
from imgclf_jax.run import digests
from imgclf_jax.run.checkpoint import Checkpoints
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.scores import classification as scores
from imgclf_jax.scores import multilabel
from imgclf_jax.scores.multilabel import MultilabelScores
from imgclf_jax.tools.evaluate import attacked, by_class, corrupted, listing
from imgclf_jax.tools.evaluate.chosen_corruptions import parse
from imgclf_jax.train.evaluation import compare_with_record, evaluate, evaluate_all, open_evals
from imgclf_jax.train.leakage import initial_warnings
from imgclf_jax.trained import Trained, load_converted, load_programs, restore

log = logging.getLogger(__name__)


def main(
    config: ConfigDict, workdir: Workdir | None, checkpoint: str, format: str, predictions: str = "", top_k: int = 3,
    checkpoints: str = "", corruptions: str = "", frost: str = "", attack: str = "",
) -> int:  # fmt: skip
    """Prints the metrics of each evaluation set, its scores, and a table of its classes.

    Scores and predictions of several seeds are those of their ensemble. The format "json" prints one object: the
    `step`, and for each set its metrics, its `scores` with 95 % confidence intervals, its `class_names` and, in their
    order, its `confusion`, [label][prediction]. With more than CONFUSION_CLASSES classes, `class_examples`,
    `class_predicted` and `class_correct` replace `scores` and `confusion`; a multi-label set has `classes` (see
    `multilabel.by_class`).

    - `workdir` is the run to evaluate; None evaluates the weights that `init_from` names.
    - `predictions` is a file for the `top_k` classes of each example, or "".
    - `checkpoints`, "all" or steps such as "100,200", prints the metrics at each of them instead.
    - `corruptions`, "all" or names, prints the accuracy on corrupted images instead (see `corrupted`); `frost` is the
      folder with the photographs for one of them.
    - `attack` prints the accuracy on adversarial examples instead (see `attacked`).
    """
    if attack and (corruptions or frost or checkpoints or predictions):
        raise UserError("--attack prints accuracies only: drop --corruptions, --frost, --checkpoints and "
                        "--predictions")  # fmt: skip
    if corruptions and (checkpoints or predictions):
        raise UserError("--corruptions prints accuracies only: drop --checkpoints and --predictions")
    if frost and not corruptions:
        raise UserError("--frost needs --corruptions: add --corruptions=all or --corruptions=frost, or drop --frost")
    if checkpoints:
        if not workdir or checkpoint or predictions:
            raise UserError("--checkpoints evaluates several checkpoints of a run: drop --checkpoint, --predictions "
                            "and --config.init_from")  # fmt: skip
        return _report_checkpoints(config, workdir, checkpoints, format)
    perturb = build_attack(attack) if attack else None
    kinds, photographs = parse(corruptions, frost) if corruptions else ([], ())
    listing_file = Path(predictions) if predictions else None
    restored = restore(config, workdir, checkpoint) if workdir else None
    base = datasets.open_data(config)
    programs, state, step = model = restored or load_converted(config, base)
    predicts = _check_evaluates(programs, bool(listing_file or perturb or kinds))
    for flag, value in (("--attack", attack), ("--corruptions", corruptions)):
        if value and programs.recipe.task is Task.MULTILABEL:
            raise UserError(f"{flag} measures accuracy, but this run has {metrics.TASK_NAMES[programs.recipe.task]}; "
                            f"evaluate it without {flag}")  # fmt: skip
    evals = open_evals(programs, base)
    if workdir:
        compare_with_record(programs, workdir, base, evals)
    for sentence in () if workdir else initial_warnings(config, base):
        log.warning("%s", sentence)
    if perturb:
        return attacked.report(model, evals, attack, perturb, format)
    if kinds:
        left_out = ["frost"] if corruptions == "all" and not frost else []
        return corrupted.report(model, evals, kinds, photographs, left_out, format)
    names = programs.recipe.data.class_names
    few_classes = len(names) <= metrics.CONFUSION_CLASSES
    programs = dataclasses.replace(programs, predicting=predicts and (few_classes or listing_file is not None))
    digest = model.params_sha256 if listing_file else ""
    results: JsonObject = {"step": step}
    classes: dict[str, dict[str, np.ndarray]] = {}
    multilabel_scores: dict[str, MultilabelScores] = {}
    rows: list[JsonObject] = []
    for name, images in evals.items():
        sums, predicted = evaluate(programs, state, images, caption=f"evaluating {name}")
        results[name] = metrics.summarize(sums, predicted, programs.recipe.whole_set_metrics)
        if "class_examples" in sums:
            classes[name] = by_class.counts(sums, programs.recipe.num_seeds)
        if predicted is None or processes.index():
            continue
        predicted = predicted.for_seed(-1) if programs.recipe.num_seeds > 1 else predicted
        examples, origin = [], ""
        if listing_file:
            examples = [images.source.listed_name(i) for i in range(len(images))]
            origin = listing.origin(config, step, digest, name, images.source.fingerprint)
        if isinstance(predicted, metrics.TargetPredictions):
            multilabel_scores[name] = own = metrics.multilabel_scores(predicted)
            results[name]["scores"] = scores.with_bootstrap(own.compute, len(images), predicted.targets.size)
            rows += listing.target_rows(
                name, examples, predicted.targets, predicted.outputs, names, own.exact, step, origin
            )
            continue
        labels, probabilities = predicted.labels, predicted.probabilities
        if few_classes:
            results[name]["scores"] = scores.with_intervals(labels, probabilities, predicted.from_logits)
        if listing_file:
            top = min(top_k, len(names))
            rows += listing.rows(name, examples, labels, probabilities, names, top, step, origin, predicted.from_logits)
    if processes.index():
        return 0
    if listing_file:
        listing.write(listing_file, rows)
        log.info("wrote the predictions for %d examples to %s", len(rows), listing_file)
    if format == "json":
        for name, counts in classes.items():
            shown = ("confusion",) if "confusion" in counts else tuple(counts)
            results[name] |= {"class_names": list(names)}
            results[name] |= {key: counts[key].tolist() for key in shown}
        for name, own in multilabel_scores.items():
            results[name] |= {"class_names": list(names), "classes": multilabel.by_class(own, names)}
        print_json(results)
        return 0
    for name in evals:
        set_scores = results[name].pop("scores", {})
        print(f"{name}: {format_metrics(results[name])}")
        _print_scores(set_scores)
        if name in classes:
            _print_classes(names, classes[name])
            if programs.recipe.task is Task.SOFT:
                print_text(_DOMINANT)
        elif name in multilabel_scores:
            print_table(*multilabel.table(multilabel_scores[name], names))
            print_text(multilabel.THRESHOLD_NOTE)
    return 0


_DOMINANT = "Each label is the class of the largest weight in the target; only loss, nll and kl use the whole target."


def _check_evaluates(programs: Programs, need_predictions: bool = False) -> bool:
    """Returns whether the run predicts. Raises UserError if it neither predicts nor has metrics of its own."""
    method = programs.recipe.method
    if need_predictions or not method.evaluate:
        programs.check_predicts()
    return method.predicts


def _restore_each(config: ConfigDict, workdir: Workdir, which: str) -> Iterator[Trained]:
    """Yields the trained model at several steps; `which` is "all", or steps such as "100,200".

    Raises UserError at once if a step has no checkpoint.
    """
    programs = load_programs(config, workdir)
    kept = Checkpoints(workdir.checkpoints, config.checkpoint.keep, config.checkpoint.best, read_only=True)
    saved = workdir.checkpoints.is_dir()
    there = processes.broadcast(kept.steps) if saved else []
    asked = [str(step) for step in there] if which == "all" else which.split(",")
    if not there or not set(asked) <= {str(step) for step in there}:
        raise UserError(
            f"--checkpoints={which}: there are {there} in {workdir.checkpoints}; pass all, or some of these"
        )

    def load(step: int) -> Trained:
        model = Trained(programs, kept.restore(step, {"state": programs.state_shape}, optimizer=False)["state"], step)
        digests.check(workdir, step, model.state.params)
        return model

    return (load(int(step)) for step in asked)


def _report_checkpoints(config: ConfigDict, workdir: Workdir, checkpoints: str, format: str) -> int:
    """Prints the metrics of each evaluation set at each checkpoint: one row per step, or a JSON list."""
    models = _restore_each(config, workdir, checkpoints)
    base = datasets.open_data(config)
    records: list[JsonObject] = []
    evals: JsonObject = {}
    for programs, state, step in models:
        if not evals:
            _check_evaluates(programs)
            evals = open_evals(programs, base)
            compare_with_record(programs, workdir, base, evals)
        records.append({"step": step, **evaluate_all(programs, state, evals)})
        log.info("evaluated step %d", step)
    if processes.index():
        return 0
    if format == "json":
        print_json(records)
        return 0
    columns = [(name, key) for name in evals for key in records[0][name] if key != "examples"]
    rows = [[str(r["step"]), *(decimals(r[name][key]) for name, key in columns)] for r in records]
    print_table(["step", *(f"{name}/{key}" for name, key in columns)], rows)
    return 0


def _print_scores(set_scores: dict[str, dict[str, float]]) -> None:
    """Prints each score with its 95 % confidence interval, over test sets of this size."""
    if set_scores:
        rows = [[name, decimals(score["value"]), interval(score["low"], score["high"]) if "low" in score else ""]
                for name, score in set_scores.items()]  # fmt: skip
        print_table(["score", "value", "95 % interval"], rows)


def _print_classes(class_names: tuple[str, ...], counts: dict[str, np.ndarray]) -> None:
    print_table(*by_class.table(class_names, counts))
    if "confusion" not in counts:
        print_text(f"The column 'most often taken for' needs the confusion matrix, which exists for up to "
              f"{metrics.CONFUSION_CLASSES} classes; these data have {len(class_names)}.")  # fmt: skip
