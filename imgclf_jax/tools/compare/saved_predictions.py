"""Runs' predictions for each example, read from a file in their directories or made by an evaluation."""

import contextlib
import csv
import dataclasses
import functools
import io
import json
import logging
import math
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from imgclf_jax import datasets
from imgclf_jax.core import json_files, paths
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.core.text import escape_surrogates
from imgclf_jax.core.typing import JsonMapping
from imgclf_jax.metrics import Predictions
from imgclf_jax.recipe import check_names
from imgclf_jax.run.record import Record
from imgclf_jax.scores.classification import bootstrap
from imgclf_jax.scores.multilabel import MultilabelScores
from imgclf_jax.tools.evaluate import listing
from imgclf_jax.train.evaluation import changed, changed_sets, evaluate, open_evals
from imgclf_jax.trained import Trained, restore

log = logging.getLogger(__name__)

FILE = "predictions.npz"  # written by `compare --test`; `evaluate --predictions` writes the others
_TARGET_ARRAYS = ("targets", "outputs")
_SAMPLES = 1000
_MAX_NUMBERS = 2_000_000_000  # limit of predictions times bootstrap samples
LISTINGS = ("predictions.csv", "predictions.jsonl")


@dataclasses.dataclass(frozen=True, eq=False)
class Saved:
    """The examples of a set that each seed of a run predicts correctly, with targets and outputs if not classes."""

    examples: tuple[str, ...]  # names, or indices
    labels: tuple[str, ...]  # class names, or targets
    correct: np.ndarray  # bool[seeds, n]
    targets: np.ndarray | None = None  # f32[n, k], for multi-label runs
    outputs: np.ndarray | None = None  # f32[seeds, n, k]: what ranks the examples of a label

    def pairs_with(self, other: "Saved") -> bool:
        """Whether both have the same examples, in the same order."""
        return self.examples == other.examples and self.labels == other.labels

    @property
    def totals(self) -> dict[str, float]:
        """What an evaluation with these predictions reports, by the names in result.json, as means over the seeds."""
        found: dict[str, float] = {"examples": len(self.examples)}
        found["accuracy" if self.targets is None else "exact_match"] = float(self.correct.mean())
        return found

    @functools.cached_property
    def scores(self) -> dict[str, np.ndarray]:
        """{score: f64[seeds, 1 + samples]}: each seed's score on all examples and on bootstrap samples, see `paired`.

        `mean_average_precision` of multi-label runs; {} if that would take minutes.
        """
        if self.targets is None or self.outputs is None:
            return {}
        n, name = len(self.examples), "mean_average_precision"
        if self.outputs.size * _SAMPLES > _MAX_NUMBERS:
            log.warning("skipping the paired bootstrap, because %d predictions are too many", self.outputs.size)
            return {}
        compute = [MultilabelScores(self.targets, outputs).compute for outputs in self.outputs]
        values = [one(np.ones((1, n))) for one in compute]
        samples = [bootstrap(one, n, _SAMPLES, at_once=1 << 21) for one in compute]  # the same samples for each seed
        return {name: np.stack([np.append(a[name], b.get(name, ())) for a, b in zip(values, samples, strict=True)])}


def load(run: Record) -> dict[str, Saved]:
    """Loads the predictions in a run's directory, by evaluation set; {} if there are none of its result.

    Their origin must be the run's (see `listing.origin`): the step and parameters of its result, its config, and its
    recorded data. And they must score what its result says.
    """
    if run.final is None:
        return {}
    origins = _origins(run)
    saved = _without_wrong(_read_npz(run, origins), run, run.workdir.path / FILE)
    for name in LISTINGS if not saved else ():
        path = run.workdir.path / name
        if path.is_file():
            if run.config.num_seeds > 1:
                log.warning("%s has the ensemble's predictions; add --test to make those of each seed", path)
                return {}
            try:
                if listed := _parse_rows(_read_rows(path), origins):
                    return _without_wrong(listed, run, path)
                log.warning("ignoring %s, which has another checkpoint, config or data than the run's result; --test "
                            "evaluates the run", path)  # fmt: skip
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
                log.warning("ignoring %s, which `evaluate --predictions` did not write (%s)", path, reason(e))
    return saved


def _without_wrong(saved: dict[str, Saved], run: Record, path: Path) -> dict[str, Saved]:
    """Drops the sets whose predictions do not score what the run's result says, with a warning."""
    kept = {}
    for name, own in saved.items():
        recorded = json_files.as_object((run.final or {}).get(name))
        wrong = [
            f"{kind} {value:.6g}, and result.json says {recorded[kind]}"
            for kind, value in own.totals.items()
            if isinstance(recorded.get(kind), int | float) and not np.isclose(value, recorded[kind], 1e-5, 1e-7)
        ]
        if wrong:
            log.warning("ignoring the set %s of %s, which has %s; --test evaluates the run", name, path, wrong[0])
        else:
            kept[name] = own
    return kept


def _origins(run: Record) -> dict[str, str]:
    """Returns the origin of the predictions that belong to the run's result, by recorded set."""
    result = run.final or {}
    return {name: listing.origin(run.config, result["step"], str(result.get("params_sha256")), name, run.evals[name])
            for name in run.config.data.eval if name in run.evals}  # fmt: skip


def _read_npz(run: Record, origins: Mapping[str, str]) -> dict[str, Saved]:
    path = run.workdir.path / FILE
    if not path.is_file():
        return {}
    try:
        with paths.open_regular(path) as stream, np.load(stream, allow_pickle=False) as file:
            facts = json.loads(str(file["facts"])).get("origins", {})
            saved = {name: Saved(_escaped(file[f"{i}/examples"].tolist()), _escaped(file[f"{i}/labels"].tolist()),
                                 file[f"{i}/right"].astype(bool), *(file.get(f"{i}/{x}") for x in _TARGET_ARRAYS))
                     for i, name in enumerate(facts) if facts[name] == origins.get(name)}  # fmt: skip
            if any(own.correct.shape[1:] != (len(own.examples),) for own in saved.values()):
                raise ValueError("arrays of different lengths")
            return saved
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as e:
        log.warning("ignoring the damaged %s (%s); --test writes it again", path, reason(e))
        return {}


def _read_rows(path: Path) -> Iterable[JsonMapping]:
    lines = io.StringIO(paths.read(path).decode(), newline="")
    return list(csv.DictReader(lines)) if path.suffix == ".csv" else [json.loads(line) for line in lines]


def _parse_rows(rows: Iterable[JsonMapping], origins: Mapping[str, str]) -> dict[str, Saved]:
    by_set: dict[str, list[JsonMapping]] = {}
    for row in rows:
        if str(row.get("origin")) == origins.get(str(row["set"])):
            by_set.setdefault(str(row["set"]), []).append(row)
    saved = {}
    for name, own in by_set.items():
        examples, labels = tuple(str(row["example"]) for row in own), tuple(map(_label, own))
        correct = [[{"true": True, "false": False}[str(row["correct"]).lower()] for row in own]]
        columns = [[column for column in own[0] if column.startswith(kind)] for kind in ("target[", "probability[")]
        targets, outputs = (np.array([[row[column] for column in each] for row in own], np.float32) for each in columns)
        saved[name] = Saved(examples, labels, np.array(correct, bool),
                            *((targets, outputs[None]) if columns[0] else ()))  # fmt: skip
    return saved


def _label(row: JsonMapping) -> str:
    if "label" in row:
        return str(row["label"])
    targets = [value for name, value in row.items() if name.startswith("target[")]
    return _format_target(math.nan if value is None else float(value) for value in targets)  # JSON has null for NaN


def _escaped(names: Iterable[str]) -> tuple[str, ...]:
    """The names as `listing.write` writes them, so that predictions of both origins pair."""
    return tuple(map(escape_surrogates, names))


def _format_target(target: Iterable[float]) -> str:
    return " ".join(f"{x:g}" for x in target)


def make(run: Record, trust: bool) -> dict[str, Saved]:
    """Evaluates the latest checkpoint of a finished run, and saves the predictions in its directory.

    Imports no modules that the run names unless `trust`. Raises UserError if the run cannot be evaluated, or if its
    checkpoint or data are not those of its result.
    """
    with contextlib.nullcontext() if trust else run.workdir.untrusted():
        check_names(run.config)
        model = restore(run.config, run.workdir, "latest")
        _check_checkpoint(run, model)
        model.programs.check_predicts()
        programs, state = dataclasses.replace(model.programs, predicting=True), model.state
        base = datasets.open_data(run.config)
        evals = open_evals(programs, base)
        if differing := changed_sets(programs, run.config, run.evals, evals):
            raise UserError(f"its evaluation set {differing[0]} has changed since training; restore the data")
        if changed(programs, run.config, base):
            raise UserError("its data have changed since training; restore them")
        if modules := run.workdir.changed_modules():
            raise UserError(f"{modules[0]} has changed since training; restore it")
        made, seeds = {}, run.config.num_seeds
        for name, images in evals.items():
            caption = f"evaluating {run.name} on {name}"
            _, predictions = evaluate(programs, state, images, caption=caption)
            names = programs.recipe.data.class_names
            arrays: tuple[np.ndarray, ...] = ()
            if isinstance(predictions, Predictions):
                correct = np.atleast_2d(predictions.ranks == 0)  # [seeds, n], then the ensemble's if there are several
                labels = _escaped(names[label] for label in predictions.labels)
            else:
                assert predictions is not None
                outputs, ranking = (x.reshape(-1, *predictions.targets.shape)[:seeds]
                                    for x in (predictions.outputs, predictions.ranking))  # fmt: skip
                correct = np.stack([MultilabelScores(predictions.targets, own).exact for own in outputs])
                labels = tuple(map(_format_target, predictions.targets))
                arrays = predictions.targets, ranking
            examples = _escaped(images.source.listed_name(i) for i in range(len(labels)))
            made[name] = Saved(examples, labels, correct[:seeds], *arrays)
    try:
        # Without a recorded fingerprint, a later load could not tell whether the data are still the same.
        if set(made) <= set(run.evals):
            _save(run, made)
    except OSError as e:
        log.warning("cannot save the predictions of %s: %s", run.name, e.strerror or e)
    return made


def _check_checkpoint(run: Record, model: Trained) -> None:
    """Raises UserError unless the model is that of the run's result."""
    result = run.final or {}
    if model.step != result["step"]:
        raise UserError(f"its latest checkpoint has step {model.step}, but its result has step {result['step']}")
    if result.get("params_sha256") not in (None, model.params_sha256):
        raise UserError("the parameters in its latest checkpoint are not those of its result")


def _save(run: Record, predictions: Mapping[str, Saved]) -> None:
    arrays: dict[str, np.ndarray] = {"facts": np.array(json.dumps({"origins": _origins(run)}))}
    for i, own in enumerate(predictions[name] for name in _origins(run)):
        arrays |= {
            f"{i}/examples": np.array(own.examples),
            f"{i}/labels": np.array(own.labels),
            f"{i}/right": own.correct,
            **{f"{i}/{x}": getattr(own, x) for x in _TARGET_ARRAYS if getattr(own, x) is not None},
        }
    path = run.workdir.path / FILE
    with paths.replacing(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def load_all(runs: Iterable[Record], test: bool, trust: bool) -> dict[str, dict[str, Saved]]:
    """Loads the predictions of each finished run, by run and set; with `test`, makes missing ones."""
    predictions = {}
    for run in runs:
        predictions[run.name] = load(run)
        if test and run.final is not None and not set(run.config.data.eval) <= set(predictions[run.name]):
            try:
                log.info("evaluating %s", run.name)
                predictions[run.name] = make(run, trust)
            except UserError as e:
                log.warning("the paired tests skip %s: %s", run.name, e)
    return predictions
