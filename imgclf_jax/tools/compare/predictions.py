"""Which examples each finished run predicts correctly: read from `predictions.npz` in its directory, or evaluated."""

import contextlib
import dataclasses
import json
import logging
import zipfile
from collections.abc import Iterable, Mapping

import numpy as np

from imgclf_jax import datasets
from imgclf_jax.core import paths, tree
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.core.json_files import as_object
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.metrics import AnyPredictions, Predictions
from imgclf_jax.recipe import check_names
from imgclf_jax.run.record import Record
from imgclf_jax.tools.evaluate.changes import data_changes
from imgclf_jax.train.evaluation import evaluate, open_evals
from imgclf_jax.trained import restore

log = logging.getLogger(__name__)

FILE = "predictions.npz"

# bool[seeds, n] by evaluation set: the examples that each seed of a run predicts correctly, in the order of the set
Correct = dict[str, np.ndarray]


def load_all(runs: Iterable[Record], test: bool, trust: bool) -> dict[str, Correct]:
    """Loads the predictions of each finished run, by its name; with `test`, makes and saves missing ones."""
    found = {}
    for run in runs:
        found[run.name] = load(run)
        if test and run.result and not set(run.config.data.eval) <= set(found[run.name]):
            try:
                log.info("evaluating %s", run.name)
                found[run.name] = make(run, trust)
                _save(run, found[run.name])
            except UserError as e:
                log.warning("the paired tests skip %s: %s", run.name, e)
    return found


def load(run: Record) -> Correct:
    """Loads the predictions in a run's directory; {} unless they are of the step and parameters of its result."""
    path, result = run.path / FILE, run.result
    if not result or not path.is_file():
        return {}
    try:
        with paths.open_regular(path) as stream, np.load(stream, allow_pickle=False) as file:
            facts = json.loads(str(file["facts"]))
            found = {name: file[f"{i}"].astype(bool) for i, name in enumerate(facts.pop("sets"))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as e:
        log.warning("ignoring the damaged %s (%s); --test writes it again", path, reason(e))
        return {}
    if facts != _facts(run):
        return {}
    return {name: correct for name, correct in found.items()
            if correct.shape == (run.config.num_seeds, as_object(result.get(name)).get("examples"))}  # fmt: skip


def _facts(run: Record) -> JsonObject:
    """What the predictions of a run's result are of."""
    result = run.result
    return {"step": result.get("step"), "params_sha256": result.get("params_sha256"), "evals": run.evals}


def _save(run: Record, correct: Mapping[str, np.ndarray]) -> None:
    facts = np.array(json.dumps({**_facts(run), "sets": list(correct)}))
    try:
        with paths.replacing(run.path / FILE) as file:
            np.savez_compressed(
                file, allow_pickle=False, facts=facts, **{f"{i}": own for i, own in enumerate(correct.values())}
            )
    except OSError as e:
        log.warning("cannot save the predictions of %s: %s", run.name, e.strerror or e)


def make(run: Record, trust: bool) -> Correct:
    """Evaluates the latest checkpoint of a finished run.

    Imports no modules that the run names unless `trust`. Raises UserError if the run cannot be evaluated, or if its
    checkpoint, code or evaluation sets are not those of its result.
    """
    with contextlib.nullcontext() if trust else run.workdir.untrusted():
        check_names(run.config)
        model = restore(run.config, run.workdir, "latest")
        result = run.result
        if model.step != result["step"]:
            raise UserError(f"its latest checkpoint has step {model.step}, but its result has step {result['step']}")
        if result.get("params_sha256") not in (None, tree.sha256(model.state.params)):
            raise UserError("the parameters in its latest checkpoint are not those of its result")
        model.programs.check_predicts()
        programs = dataclasses.replace(model.programs, predicting=True)
        base = datasets.open_data(run.config)
        evals = open_evals(programs, base)
        if changes := data_changes(programs, run.config, run.evals, base, evals):
            raise UserError(f"{changes[0]}; restore the data")
        if modules := run.workdir.changed_modules():
            raise UserError(f"{modules[0]} has changed since training; restore it")
        made = {}
        for name, images in evals.items():
            _, predictions = evaluate(programs, model.state, images, caption=f"evaluating {run.name} on {name}")
            assert predictions is not None
            made[name] = _correct(predictions, run.config.num_seeds)
    return made


def _correct(predictions: AnyPredictions, seeds: int) -> np.ndarray:
    """bool[seeds, n], of several seeds without their ensemble; with targets, whether all labels are predicted."""
    if isinstance(predictions, Predictions):
        return np.atleast_2d(np.asarray(predictions.ranks) == 0)[:seeds]
    each = [predictions] if seeds == 1 else [predictions.for_seed(i) for i in range(seeds)]
    return np.stack([one.exact for one in each])
