"""What runs have right of each example: as a file in their directories says, or from an evaluation now."""

import contextlib
import csv
import dataclasses
import functools
import importlib.util
import json
import logging
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from imgclf_jax.core import places, processes
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.data import sources
from imgclf_jax.losses import Task
from imgclf_jax.metrics import Predictions
from imgclf_jax.recipe import check_names
from imgclf_jax.run.record import Record
from imgclf_jax.scores.classification import bootstrap
from imgclf_jax.scores.multilabel import MultilabelScores
from imgclf_jax.scores.regression import RegressionScores
from imgclf_jax.tools.evaluate import listing
from imgclf_jax.train.evaluation import changed, changed_sets, evaluate, open_evals
from imgclf_jax.trained import Trained, restore

log = logging.getLogger(__name__)

FILE = "predictions.npz"  # what `compare --test` keeps; `evaluate --predictions` writes the others
_OF_TARGETS = ("targets", "outputs")
_SAMPLES = 1000
_MOST_NUMBERS = 2_000_000_000  # of samples that are looked at
LISTINGS = ("predictions.csv", "predictions.jsonl", "predictions.parquet")


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """Which examples of a set each seed of a run has right, and what it predicts where targets are several."""

    examples: tuple[str, ...]  # what each is called, or its number
    labels: tuple[str, ...]  # the names of their classes, or their targets
    right: np.ndarray  # bool[seeds, n]; [0, n] in a regression, which has no right and wrong
    targets: np.ndarray | None = None  # f32[n, k], of several labels and of numbers
    outputs: np.ndarray | None = None  # f32[seeds, n, k]: what orders the examples of a label, or the values

    def pairs_with(self, other: "Known") -> bool:
        """Whether both are of the same examples, in the same order."""
        return self.examples == other.examples and self.labels == other.labels

    @functools.cached_property
    def scores(self) -> dict[str, np.ndarray]:
        """{score: f64[seeds, 1 + samples]}: of each seed, on the examples and on samples of these, see `paired`.

        `mean_average_precision` of several labels, `r2` and `mae` of numbers; {} where it would take minutes.
        """
        if self.targets is None or self.outputs is None:
            return {}
        n, wanted = len(self.examples), ("mean_average_precision",) if len(self.right) else ("r2", "mae")
        if self.outputs.size * _SAMPLES > _MOST_NUMBERS:
            log.warning("%d predictions are too many for the paired bootstrap, which is left out", self.outputs.size)
            return {}
        kind = MultilabelScores if len(self.right) else RegressionScores
        of = [kind(self.targets, outputs).compute for outputs in self.outputs]
        whole = [one(np.ones((1, n))) for one in of]
        drawn = [bootstrap(one, n, _SAMPLES, at_once=1 << 21) for one in of]  # the same samples for each
        return {name: np.stack([np.append(a[name], b.get(name, ())) for a, b in zip(whole, drawn, strict=True)])
                for name in wanted}  # fmt: skip


def known(run: Record) -> dict[str, Known]:
    """The predictions in the run's directory, by evaluation set; {} if there are none, or not of its result.

    They are used only where their origin is the run's (see `listing.origin`): its result's step and parameters, its
    config, and the data that it has recorded.
    """
    if run.final is None:
        return {}
    origins = _origins(run)
    found = _kept(run, origins)
    for name in LISTINGS if not found else ():
        path = run.workdir.path / name
        if path.is_file():
            if run.config.num_seeds > 1:
                log.warning("%s holds the ensemble's predictions, not those of each seed: --test makes these", path)
                return {}
            try:
                if listed := _listed(_rows(path), origins):
                    return listed
                log.warning("%s is left out: it is not of the checkpoint, config and data of the run's result; --test "
                            "evaluates the run", path)  # fmt: skip
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
                log.warning("%s is left out: it is no file of `evaluate --predictions` (%s)", path, reason(e))
    return found


def _origins(run: Record) -> dict[str, str]:
    """The origin of the predictions that belong to the run's result, by set; without the sets not recorded."""
    result = run.final or {}
    return {name: listing.origin(run.config, result["step"], str(result.get("params_sha256")), name, run.evals[name])
            for name in run.config.data.eval if name in run.evals}  # fmt: skip


def _kept(run: Record, origins: Mapping[str, str]) -> dict[str, Known]:
    path = run.workdir.path / FILE
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            facts = json.loads(str(file["facts"])).get("origins", {})
            return {name: Known(tuple(file[f"{i}/examples"].tolist()), tuple(file[f"{i}/labels"].tolist()),
                                file[f"{i}/right"].astype(bool), *(file.get(f"{i}/{x}") for x in _OF_TARGETS))
                    for i, name in enumerate(facts) if facts[name] == origins.get(name)}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as e:
        log.warning("%s is damaged (%s): it is left out; --test writes it anew", path, reason(e))
        return {}


def _rows(path: Path) -> Iterable[Mapping[str, Any]]:
    if path.suffix == ".parquet":
        if not importlib.util.find_spec("pyarrow"):
            raise ValueError("pyarrow is not installed, which reads it")
        from pyarrow import parquet

        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
        return rows
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]


def _listed(rows: Iterable[Mapping[str, Any]], origins: Mapping[str, str]) -> dict[str, Known]:
    by_set: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if str(row.get("origin")) == origins.get(str(row["set"])):
            by_set.setdefault(str(row["set"]), []).append(row)
    found = {}
    for name, some in by_set.items():
        examples, labels = tuple(str(row["example"]) for row in some), tuple(map(_label, some))
        numbers = "label" not in some[0] and "correct" not in some[0]
        right = [[{"true": True, "false": False}[str(row["correct"]).lower()] for row in some]] if not numbers else []
        columns = [[column for column in some[0] if column.startswith(kind)]
                   for kind in (("target[",), ("probability[", "value["))]  # fmt: skip
        of_targets = [np.array([[row[column] for column in each] for row in some], np.float32) for each in columns]
        one = Known(examples, labels, np.array(right, bool).reshape(-1, len(some)))
        if columns[0]:
            one = dataclasses.replace(one, targets=of_targets[0], outputs=of_targets[1][None])
        found[name] = one
    return found


def _label(row: Mapping[str, Any]) -> str:
    """The class of an example, or its targets."""
    if "label" in row:
        return str(row["label"])
    return _labels([float(value) for name, value in row.items() if name.startswith("target[")])


def _labels(target: Iterable[float]) -> str:
    return " ".join(f"{x:g}" for x in target)


def make(run: Record, trust: bool) -> dict[str, Known]:
    """Evaluates a run that is done, and keeps what it predicts in its directory.

    Its latest checkpoint is evaluated, which its result is of. Nothing that the run names is imported, unless `trust`.
    Raises UserError if it cannot be evaluated, and if its checkpoint or its data are not those of its result.
    """
    with contextlib.nullcontext() if trust else run.workdir.untrusted():
        check_names(run.config)
        model = restore(run.config, run.workdir, "latest")
        _check_checkpoint(run, model)
        model.programs.check_predicts()
        programs, state = dataclasses.replace(model.programs, predicting=True), model.state
        base = sources.open_data(run.config)
        evals = open_evals(programs, base)
        if others := changed_sets(programs, run.config, run.evals, evals):
            raise UserError(f"its evaluation set {others[0]} has changed since training; restore the data")
        if changed(programs, run.config, base):
            raise UserError("its data have changed since training; restore them")
        found, seeds = {}, run.config.num_seeds
        for name, images in evals.items():
            _, predictions = evaluate(programs, state, images)
            called, names = getattr(images.source, "name", str), programs.recipe.data.class_names
            of_targets: tuple[np.ndarray, ...] = ()
            if isinstance(predictions, Predictions):
                right = np.atleast_2d(predictions.ranks == 0)  # [seeds, n], of several seeds also the ensemble's
                labels = tuple(names[label] for label in predictions.labels)
            else:
                assert predictions is not None
                each, ranking = (x.reshape(-1, *predictions.targets.shape)[:seeds]
                                 for x in (predictions.outputs, predictions.ranking))  # fmt: skip
                numbers = model.task is Task.REGRESSION
                rights = [] if numbers else [MultilabelScores(predictions.targets, own).exact for own in each]
                right = np.array(rights, bool).reshape(-1, len(predictions.targets))
                labels = tuple(map(_labels, predictions.targets))
                of_targets = predictions.targets, each if numbers else ranking
            examples = tuple(called(i) for i in range(len(labels)))
            found[name] = Known(examples, labels, right[:seeds], *of_targets)
    try:
        # Of a set without a recorded fingerprint nothing would tell later whether the data are still the same.
        if set(found) <= set(run.evals) and not processes.index():
            _keep(run, found)
    except OSError as e:
        log.warning("the predictions of %s cannot be kept: %s", run.name, e.strerror or e)
    return found


def _check_checkpoint(run: Record, model: Trained) -> None:
    """Raises UserError unless the model is that of the run's result."""
    result = run.final or {}
    if model.step != result["step"]:
        raise UserError(f"its latest checkpoint is of step {model.step}, and its result of step {result['step']}")
    if result.get("params_sha256") not in (None, model.params_sha256):
        raise UserError("the parameters in its latest checkpoint are not those of its result")


def _keep(run: Record, found: Mapping[str, Known]) -> None:
    arrays: dict[str, np.ndarray] = {"facts": np.array(json.dumps({"origins": _origins(run)}))}
    for i, own in enumerate(found[name] for name in _origins(run)):
        arrays |= {
            f"{i}/examples": np.array(own.examples),
            f"{i}/labels": np.array(own.labels),
            f"{i}/right": own.right,
            **{f"{i}/{x}": getattr(own, x) for x in _OF_TARGETS if getattr(own, x) is not None},
        }
    path = run.workdir.path / FILE
    with places.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def load_all(runs: Iterable[Record], test: bool, trust: bool) -> dict[str, dict[str, Known]]:
    """The predictions of each run that is done, by its name and the set's; with `test` those missing are made."""
    found = {}
    for run in runs:
        found[run.name] = known(run)
        if test and run.final is not None and not set(run.config.data.eval) <= set(found[run.name]):
            try:
                log.info("evaluating %s", run.name)
                found[run.name] = make(run, trust)
            except UserError as e:
                log.warning("%s is left out of the tests: %s", run.name, e)
    return found
