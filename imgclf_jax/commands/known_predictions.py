"""What runs have right of each example: as a file in their directories says, or from an evaluation now."""

import contextlib
import csv
import dataclasses
import importlib.util
import json
import logging
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from imgclf_jax.commands.evaluation import evaluate, open_evals
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.data import sources
from imgclf_jax.loading import restore
from imgclf_jax.recipe import check_names
from imgclf_jax.run.records import Record

log = logging.getLogger(__name__)

FILE = "predictions.npz"  # what `compare --test` keeps; `evaluate --predictions` writes the others
LISTINGS = ("predictions.csv", "predictions.jsonl", "predictions.parquet")


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """Which examples of a set each seed of a run has right."""

    examples: tuple[str, ...]  # what each is called, or its number
    labels: tuple[str, ...]  # the names of their classes
    right: np.ndarray  # bool[seeds, n]

    def pairs_with(self, other: "Known") -> bool:
        """Whether both are of the same examples, in the same order."""
        return self.examples == other.examples and self.labels == other.labels


def known(run: Record) -> dict[str, Known]:
    """The predictions in the run's directory, by evaluation set; {} if there are none, or not of its result."""
    if run.result is None:
        return {}
    found = _kept(run)
    for name in LISTINGS if found is None else ():
        path = run.workdir.path / name
        if path.is_file():
            if run.config.num_seeds > 1:
                log.warning("%s holds the ensemble's predictions, not those of each seed: --test makes these", path)
                return {}
            try:
                return _listed(_rows(path))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
                log.warning("%s is left out: it is no file of `evaluate --predictions` (%s)", path, reason(e))
    return found or {}


def _kept(run: Record) -> dict[str, Known] | None:
    path = run.workdir.path / FILE
    if not path.is_file():
        return None
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            facts = json.loads(str(file["facts"]))
            if facts != _facts(run):
                return None  # of a shorter run, or of other evaluation sets
            return {name: Known(tuple(file[f"{i}/examples"].tolist()), tuple(file[f"{i}/labels"].tolist()),
                                file[f"{i}/right"].astype(bool)) for i, name in enumerate(facts["sets"])}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as e:
        log.warning("%s is damaged (%s): it is left out; --test writes it anew", path, reason(e))
        return None


def _facts(run: Record) -> dict[str, Any]:
    """What predictions depend on, but for the run's directory."""
    result = run.result or {}
    return {"step": result.get("step"), "params_sha256": result.get("params_sha256"),
            "sets": dict(run.config.data.eval)}  # fmt: skip


def _rows(path: Path) -> Iterable[Mapping[str, Any]]:
    if path.suffix == ".parquet":
        if not importlib.util.find_spec("pyarrow"):
            raise ValueError("pyarrow is not installed, which reads it")
        from pyarrow import parquet

        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
        return rows
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]


def _listed(rows: Iterable[Mapping[str, Any]]) -> dict[str, Known]:
    by_set: dict[str, list[tuple[str, str, bool]]] = {}
    for row in rows:
        right = {"true": True, "false": False}[str(row["correct"]).lower()]
        by_set.setdefault(str(row["set"]), []).append((str(row["example"]), str(row["label"]), right))
    found = {}
    for name, some in by_set.items():
        examples, labels = tuple(row[0] for row in some), tuple(row[1] for row in some)
        found[name] = Known(examples, labels, np.array([[row[2] for row in some]]))
    return found


def make(run: Record, trust: bool) -> dict[str, Known]:
    """Evaluates a run that is done, and keeps what it predicts in its directory. Raises UserError if it cannot.

    Its latest checkpoint is evaluated, which its result is of. Nothing that the run names is imported, unless `trust`.
    """
    with contextlib.nullcontext() if trust else run.workdir.without_code():
        check_names(run.config)
        programs, state, _ = restore(run.config, run.workdir, "latest")
        programs = dataclasses.replace(programs, predicting=True)
        base = sources.open_data(run.config)
        found = {}
        for name, images in open_evals(programs, base).items():
            _, predictions = evaluate(programs, state, images)
            assert predictions is not None
            probabilities = predictions.probabilities
            each = probabilities[:-1] if run.config.num_seeds > 1 else probabilities[None]  # the last: the ensemble's
            chosen = np.where(np.isnan(each).any(-1), -1, each.argmax(-1))  # [seeds, n]
            called = getattr(images.source, "name", str)
            names = programs.recipe.data.class_names
            found[name] = Known(
                tuple(called(i) for i in range(len(predictions.labels))),
                tuple(names[label] for label in predictions.labels),
                chosen == predictions.labels,
            )
    try:
        _keep(run, found)
    except OSError as e:
        log.warning("the predictions of %s cannot be kept: %s", run.name, e.strerror or e)
    return found


def _keep(run: Record, found: Mapping[str, Known]) -> None:
    arrays: dict[str, np.ndarray] = {"facts": np.array(json.dumps(_facts(run)))}
    for i, own in enumerate(found.values()):
        arrays |= {
            f"{i}/examples": np.array(own.examples),
            f"{i}/labels": np.array(own.labels),
            f"{i}/right": own.right,
        }
    path = run.workdir.path / FILE
    temporary = path.with_name(f".{FILE}.tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    temporary.replace(path)


def of_all(runs: Iterable[Record], test: bool, trust: bool) -> dict[str, dict[str, Known]]:
    """The predictions of each run that is done, by its name and the set's; with `test` those missing are made."""
    found = {}
    for run in runs:
        found[run.name] = known(run)
        if test and run.result is not None and not set(run.config.data.eval) <= set(found[run.name]):
            try:
                log.info("evaluating %s", run.name)
                found[run.name] = make(run, trust)
            except UserError as e:
                log.warning("%s is left out of the tests: %s", run.name, e)
    return found
