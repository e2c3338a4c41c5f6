"""The command `probe`: measures features with nearest neighbors, linear probes and few-shot probes."""

import logging
import re
from collections.abc import Iterable

import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import datasets
from imgclf_jax.core import terminal
from imgclf_jax.core.errors import UsageError, UserError
from imgclf_jax.core.text import decimals
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.data.source import Source
from imgclf_jax.losses import Task
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.evaluate import outputs
from imgclf_jax.tools.evaluate.changes import compare_with_record
from imgclf_jax.tools.probe import probing
from imgclf_jax.train.evaluation import open_evals
from imgclf_jax.train.leakage import initial_warnings, overlap_warnings
from imgclf_jax.trained import load_converted, restore

log = logging.getLogger(__name__)

SHOTS = (1, 5, 10, 25)

# {"set", "method", "accuracies" or "scores": one per seed and draw} and, by the method, "k", "C", "shots" or "score"
type Record = JsonObject


def main(config: ConfigDict, workdir: Workdir | None, checkpoint: str, format: str, k: str, draws: int) -> int:
    """Prints the accuracies on each evaluation set of probes that are fitted to the training features.

    The probes are k-nearest neighbors, a linear probe, and linear probes on few images per class.

    - `workdir` is the run to use; None uses the weights that `init_from` names, with or without a head.
    - `k` lists the numbers of neighbors, separated by commas.
    - `draws` is the number of few-shot subsets.
    """
    ks = _parse_ks(k)
    restored = restore(config, workdir, checkpoint) if workdir else None
    base = datasets.open_data(config)
    model = restored or load_converted(config, base, whole=False)
    sets = open_evals(model.programs, base)
    if workdir:
        compare_with_record(model.programs, workdir, base, sets)
    for sentence in _overlaps(config, workdir, base):
        log.warning("%s", sentence)
    with terminal.showing("computing features"):
        train, labels = outputs.training_features(model, base)
        tests = {name: outputs.compute(model, images) for name, images in sets.items()}
    several, values = model.task is Task.MULTILABEL, "scores" if model.task is Task.MULTILABEL else "accuracies"
    if labels.ndim == 2 and not several:  # the dominant labels
        labels, tests = labels.argmax(1), {name: (x, y.argmax(1)) for name, (x, y) in tests.items()}
    records = []
    for seed, features in enumerate(train):
        with terminal.showing(f"probing{f' seed {seed}' if len(train) > 1 else ''}"):
            own = {name: (x[seed], y) for name, (x, y) in tests.items()}
            if several:
                records.append(list(probing.probe_targets(features, labels, own)))
                continue
            records.append(list(probe(features, labels, own, ks, draws, len(model.class_names))))
    joined = [{**seeds[0], values: [value for record in seeds for value in record[values]]}
              | ({"C": [record["C"] for record in seeds]} if "C" in seeds[0] else {})
              for seeds in zip(*records, strict=True)]  # fmt: skip
    for record in joined:
        record |= {"mean": float(np.mean(record[values]))}
        record |= {"deviation": float(np.std(record[values], ddof=1)) if len(record[values]) > 1 else None}
    if format == "json":
        result = {"step": model.step, "train_examples": len(labels), "features": train.shape[-1], "results": joined}
        terminal.print_json(result)
    else:
        _print(joined, probing.SCORE if several else "accuracy")
    return 0


def _overlaps(config: ConfigDict, workdir: Workdir | None, base: dict[str, Source]) -> list[str]:
    """Sentences on the evaluation sets that share examples with the split that the probes are fitted to.

    Those that hold for the run itself, which `compare_with_record` logs, are left out.
    """
    read = config.copy_and_resolve_references()
    read.method, read.data.sampling = "supervised", "permutation"  # probes read all of data.train, and no other stream
    known = overlap_warnings(workdir.load_config(), config.data, base) if workdir else []
    found = [sentence for sentence in overlap_warnings(read, config.data, base) if sentence not in known]
    return found + ([] if workdir else initial_warnings(config, base))


def probe(
    train: np.ndarray, labels: np.ndarray, tests: dict[str, tuple[np.ndarray, np.ndarray]], ks: list[int], draws: int,
    classes: int,
) -> Iterable[Record]:  # fmt: skip
    """Yields the records of one network, from features f32[n, d] and labels i32[n] of the training and test sets.

    Raises UserError if all labels are of one class.
    """
    if labels.min() == labels.max():
        raise UserError(f"all {len(labels)} training images are of one class, which leaves a probe nothing to learn; "
                        "name a split with several classes by --config.data.train")  # fmt: skip
    if most := [str(k) for k in ks if k > len(labels)]:
        log.info("skipping %s neighbors, because there are only %d training images", ", ".join(most), len(labels))
    ks = [k for k in ks if k <= len(labels)] or [len(labels)]
    counts = np.bincount(labels, minlength=classes)
    fewest = int(counts[counts > 0].min())
    shots = [few for few in SHOTS if few <= fewest]
    if len(shots) < len(SHOTS):
        log.info("skipping the few-shot probes with %s images per class, because a class has only %d training images",
                 ", ".join(str(few) for few in SHOTS if few > fewest), fewest)  # fmt: skip
    if (counts == 0).any():
        log.warning("%d classes have no training images, so no probe can learn them", (counts == 0).sum())
    strength = probing.choose_strength(train, labels)
    linear = probing.linear_probe(train, labels, strength)
    few = {
        shot: [probing.linear_probe(train[drawn], labels[drawn], 1.0)
               for drawn in (probing.draw_few(labels, shot, draw) for draw in range(draws))]
        for shot in shots
    }  # fmt: skip
    for name, (test, truth) in tests.items():

        def accuracy(predicted: np.ndarray, truth: np.ndarray = truth) -> float:
            return float((predicted == truth).mean())

        for k, predicted in probing.nearest_neighbors(train, labels, test, ks, classes).items():
            yield {"set": name, "method": "nearest neighbors", "k": k, "accuracies": [accuracy(predicted)]}
        yield {"set": name, "method": "linear probe", "C": strength, "accuracies": [accuracy(linear.predict(test))]}
        for shot, models in few.items():
            accuracies = [accuracy(model.predict(test)) for model in models]
            yield {"set": name, "method": "few images", "shots": shot, "accuracies": accuracies}


def _parse_ks(text: str) -> list[int]:
    """Parses '1,5,20' to [1, 5, 20]."""
    if not re.fullmatch(r"\s*[1-9]\d{0,8}\s*(,\s*[1-9]\d{0,8}\s*)*", text):
        raise UsageError(f"--k={text}: must be a number of neighbors, or several separated by commas, such as 1,5,20")
    return sorted({int(part) for part in text.split(",")})


def _print(records: list[Record], score: str) -> None:
    rows = []
    for record in records:
        name = record["method"]
        if name == "few images":
            name = f"linear probe on {record['shots']} per class"
        elif "k" in record:
            name += f", k = {record['k']}"
        elif "C" in record:
            name += f", C = {', '.join(f'{c:g}' for c in record['C'])}"
        spread = "" if record["deviation"] is None else f" ± {decimals(record['deviation'])}"
        rows.append([record["set"], name, f"{decimals(record['mean'])}{spread}"])
    terminal.print_table(["set", "classifier" if score == "accuracy" else "predictor", score], rows)
