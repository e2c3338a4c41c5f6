"""The command `evaluate`: the metrics and scores of a trained model, on each of its evaluation sets."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import metrics
from imgclf_jax.core import processes
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources
from imgclf_jax.losses import Task
from imgclf_jax.programs import Programs
from imgclf_jax.run.terminal import format_metrics, print_table
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.scores import classification as scores
from imgclf_jax.scores import multilabel
from imgclf_jax.scores.multilabel import MultilabelScores
from imgclf_jax.tools.evaluate import attacked, by_class, corrupted, listing
from imgclf_jax.train.evaluation import compare_with_record, evaluate, evaluate_all, open_evals
from imgclf_jax.trained import load_converted, restore, restore_each

log = logging.getLogger(__name__)


def main(
    config: ConfigDict,
    workdir: Workdir | None,
    checkpoint: str,
    format: str,
    predictions: str = "",
    top_k: int = 3,
    checkpoints: str = "",
    corruptions: str = "",
    frost: str = "",
    attack: str = "",
) -> int:
    """The command `evaluate`: prints the metrics of each evaluation set, its scores, and a table of its classes.

    It evaluates the run in `workdir`. If that is None, it evaluates the weights that `init_from` names. The format
    "json" prints one object: the `step`, and for each set its metrics, its `scores` with 95 % intervals, its
    `class_names` and, in their order, its `confusion`, [label][prediction]. Above CONFUSION_CLASSES classes there are
    no `scores` and no `confusion`, but `class_examples`, `class_predicted` and `class_correct`. If the file
    `predictions` is named, the `top_k` classes of each example are written to it. Scores and predictions of several
    seeds are those of their ensemble. Of several labels there are `classes` in place of a `confusion`, see
    `multilabel.by_class`; of a regression `target_names`. With `checkpoints`, "all" or steps such as "100,200", it
    prints the metrics at each of them instead; with `corruptions`, "all" or names, the accuracy on corrupted images:
    see `corrupted`. `frost` is the folder of photographs for one of these. With `attack` it prints the accuracy on
    adversarial examples: see `attacked`.
    """
    if attack:
        if corruptions or frost or checkpoints or predictions:
            raise UserError("--attack prints accuracies alone: drop --corruptions, --frost, --checkpoints and "
                            "--predictions")  # fmt: skip
        return attacked.report(config, workdir, checkpoint, attack, format)
    if corruptions:
        if checkpoints or predictions:
            raise UserError("--corruptions prints accuracies alone: drop --checkpoints and --predictions")
        return corrupted.report(config, workdir, checkpoint, corruptions, frost, format)
    if frost:
        raise UserError("--frost is for --corruptions: add --corruptions=all or --corruptions=frost, or drop --frost")
    if checkpoints:
        if not workdir or checkpoint or predictions:
            raise UserError("--checkpoints is for several checkpoints of a run: drop --checkpoint, --predictions and "
                            "--config.init_from")  # fmt: skip
        return _over_steps(config, workdir, checkpoints, format)
    listing_file = Path(predictions) if predictions else None
    if listing_file:
        listing.check(listing_file)
    restored = restore(config, workdir, checkpoint) if workdir else None
    base = sources.open_data(config)
    programs, state, step = model = restored or load_converted(config, base)
    predicts = _check_evaluates(programs, bool(listing_file))
    names = programs.recipe.data.class_names
    programs = dataclasses.replace(
        programs, predicting=predicts and (len(names) <= metrics.CONFUSION_CLASSES or listing_file is not None)
    )
    evals = open_evals(programs, base)
    if workdir:
        compare_with_record(programs, workdir, base, evals)
    digest = model.params_sha256 if listing_file else ""
    results: dict[str, Any] = {"step": step}
    classes: dict[str, dict[str, np.ndarray]] = {}
    of_targets: dict[str, Any] = {}  # MultilabelScores or RegressionScores
    rows: list[dict[str, Any]] = []
    for name, images in evals.items():
        sums, found = evaluate(programs, state, images)
        results[name] = metrics.summarize(sums, found, programs.recipe.whole_set_metrics)
        if "class_examples" in sums:
            classes[name] = by_class.counts(sums, programs.recipe.num_seeds)
        if found is None or processes.index():
            continue
        found = found.of_seed(-1) if programs.recipe.num_seeds > 1 else found
        called, origin = getattr(images.source, "name", str), ""
        examples = [called(i) for i in range(len(images))] if listing_file else []
        if listing_file:
            origin = listing.origin(config, step, digest, name, images.source.fingerprint())
        if isinstance(found, metrics.TargetPredictions):
            of_targets[name] = one = metrics.target_scores(programs.recipe.task, found, names)
            results[name]["scores"] = scores.with_bootstrap(one.of, len(images), found.targets.size)
            exact = one.exact if isinstance(one, MultilabelScores) else None
            rows += listing.target_rows(name, examples, found.targets, found.outputs, names, exact, step, origin)
            continue
        labels, probabilities = found.labels, found.probabilities
        if len(names) <= metrics.CONFUSION_CLASSES:
            results[name]["scores"] = scores.with_intervals(labels, probabilities, found.given)
        if listing_file:
            top = min(top_k, len(names))
            rows += listing.rows(name, examples, labels, probabilities, names, top, step, origin, found.given)
    if processes.index():
        return 0
    if listing_file:
        listing.write(listing_file, rows)
        log.info("predictions of %d examples written to %s", len(rows), listing_file)
    if format == "json":
        for name, counts in classes.items():
            shown = ("confusion",) if "confusion" in counts else tuple(counts)
            results[name] |= {"class_names": list(names)}
            results[name] |= {key: counts[key].tolist() for key in shown}
        for name, one in of_targets.items():
            if isinstance(one, MultilabelScores):
                results[name] |= {"class_names": list(names), "classes": multilabel.by_class(one, names)}
            else:
                results[name] |= {"target_names": list(names)}
        print(json.dumps(results, indent=2))
        return 0
    for name in evals:
        found_scores = results[name].pop("scores", {})
        line = {key: value for key, value in results[name].items() if "[" not in key}  # those are in the table below
        print(f"{name}: {format_metrics(line)}")
        _print_scores(found_scores)
        if name in classes:
            _print_classes(names, classes[name])
            if programs.recipe.task is Task.SOFT:
                print(_DOMINANT)
        elif isinstance(several := of_targets.get(name), MultilabelScores):
            print_table(*multilabel.table(several, names))
            print(multilabel.ON_THRESHOLDS)
    return 0


_DOMINANT = "Labels are the classes of the greatest share in each target; loss, nll and kl alone know the shares."


def _check_evaluates(programs: Programs, for_predictions: bool = False) -> bool:
    """Whether the run predicts. Raises UserError if it does not, and has nothing else to show."""
    method = programs.recipe.method
    if for_predictions or not method.evaluate:
        programs.check_predicts()
    return method.predicts


def _over_steps(config: ConfigDict, workdir: Workdir, which: str, format: str) -> int:
    """Prints the metrics of each evaluation set at each checkpoint: a row a step, or a JSON list."""
    models = restore_each(config, workdir, which)
    base = sources.open_data(config)
    records: list[dict[str, Any]] = []
    evals: dict[str, Any] = {}
    for programs, state, step in models:
        if not evals:
            _check_evaluates(programs)
            evals = open_evals(programs, base)
            compare_with_record(programs, workdir, base, evals)
        records.append({"step": step, **evaluate_all(programs, state, evals)})
        log.info("step %d is evaluated", step)
    if processes.index():
        return 0
    if format == "json":
        print(json.dumps(records, indent=2))
        return 0
    columns = [(name, key) for name in evals for key in records[0][name] if key != "examples"]
    rows = [[str(r["step"]), *(f"{r[name][key]:.4f}" for name, key in columns)] for r in records]
    print_table(["step", *(f"{name}/{key}" for name, key in columns)], rows)
    return 0


def _print_scores(found: dict[str, dict[str, float]]) -> None:
    """A table: each score and its 95 % interval, what other test sets of this size would give."""
    if found:
        rows = [[name, f"{of['value']:.4f}", f"{of['low']:.4f} to {of['high']:.4f}" if "low" in of else ""]
                for name, of in found.items()]  # fmt: skip
        print_table(["score", "value", "95 % interval"], rows)


def _print_classes(class_names: tuple[str, ...], counts: dict[str, np.ndarray]) -> None:
    """A table with a row for each class, see `by_class.table`."""
    print_table(*by_class.table(class_names, counts))
    if "confusion" not in counts:
        print(f"The column 'most often taken for' is left out: it needs the confusion matrix, which is counted for up "
              f"to {metrics.CONFUSION_CLASSES} classes only, and these are {len(class_names)}.")  # fmt: skip
