"""`evaluate --corruptions`: a trained model's accuracy on corrupted images, by corruption and severity."""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from imgclf_jax import metrics
from imgclf_jax.core import processes, sharding
from imgclf_jax.core.errors import UsageError, unknown
from imgclf_jax.core.terminal import print_json, print_table, print_text, track
from imgclf_jax.core.text import decimals
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.data import stream
from imgclf_jax.programs import Programs
from imgclf_jax.step import TrainState
from imgclf_jax.tools.evaluate.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from imgclf_jax.train import evaluation
from imgclf_jax.trained import Trained

CLEAN = ("clean", 0)
Key = tuple[str, int]  # a corruption and its severity


def parse(text: str) -> list[str]:
    """Returns the corruptions that `text` names: comma-separated names or "all". Raises UsageError for other names."""
    names = list(CORRUPTIONS) if text == "all" else [word.strip() for word in text.split(",")]
    for name in names:
        if name not in CORRUPTIONS:
            raise UsageError(f"--corruptions: {unknown('corruption', name, ['all', *CORRUPTIONS])}")
    return names


def report(model: Trained, evals: dict[str, stream.Images], names: Sequence[str], format: str) -> int:
    """Prints a table for each evaluation set: the accuracy of each corruption at each severity, and the means.

    Several seeds are evaluated as an ensemble. The format "json" prints one object: the `step`; for each set
    `examples`, `clean`, `corruptions` with `severities` and `mean` of each, and `mean_corruption_accuracy`.
    """
    programs, state, step = model
    results: JsonObject = {}
    for set_name, images in evals.items():
        found = measure(programs, state, images, names, f"corrupting {set_name}")
        by_name = {name: [found[name, severity] for severity in SEVERITIES] for name in names}
        results[set_name] = {
            "examples": len(images),
            "clean": found[CLEAN],
            "corruptions": {name: {"severities": own, "mean": float(np.mean(own))} for name, own in by_name.items()},
            "mean_corruption_accuracy": float(np.mean(list(by_name.values()))),
        }
    if processes.index():
        return 0
    if format == "json":
        print_json({"step": step, **results})
        return 0
    for set_name, summary in results.items():
        _print(set_name, summary, programs.recipe.config.num_seeds)
    return 0


def measure(
    programs: Programs, state: TrainState, images: stream.Images, names: Sequence[str], caption: str = "corrupting"
) -> dict[Key, float]:
    """Returns the accuracy over all of `images` by (corruption, severity), and under `CLEAN` without corruption.

    Images are read once, and corrupted on the host. `caption` labels the progress bar.
    """
    size, mesh = programs.eval_call_size, programs.mesh
    rows = sharding.rows_here(size, mesh)
    kinds = [CLEAN, *((name, severity) for name in names for severity in SEVERITIES)]
    sums: dict[Key, metrics.Sums] = {kind: {} for kind in kinds}
    with ThreadPoolExecutor() as pool:
        for i, batch in enumerate(track(stream.eval_batches(images, size, rows), -(-len(images) // size), caption)):
            for kind in kinds:
                corrupted = batch["image"]
                if kind != CLEAN:
                    apply = functools.partial(corrupt, *kind)
                    corrupted = np.stack(list(pool.map(apply, batch["image"], (i * size + rows).tolist())))
                own = sharding.put_batch({**batch, "image": corrupted}, mesh)
                evaluation.add(sums[kind], jax.device_get(programs.eval(*state.evaluated, own)[0]))
    accuracy = "ensemble_accuracy" if programs.recipe.config.num_seeds > 1 else "accuracy"
    return {kind: metrics.summarize(own)[accuracy] for kind, own in sums.items()}


def _print(name: str, summary: JsonObject, num_seeds: int) -> None:
    ensemble = f" of the ensemble of {num_seeds} seeds" if num_seeds > 1 else ""
    print_text(f"{name}: examples {summary['examples']}  accuracy{ensemble} {decimals(summary['clean'])}  "
               f"mean corruption accuracy {decimals(summary['mean_corruption_accuracy'])}")  # fmt: skip
    rows = [[corruption, *map(decimals, (*own["severities"], own["mean"]))]
            for corruption, own in summary["corruptions"].items()]  # fmt: skip
    columns = zip(*(own["severities"] for own in summary["corruptions"].values()), strict=True)
    rows.append(["mean of all", *map(decimals, (*map(np.mean, columns), summary["mean_corruption_accuracy"]))])
    print_table(["corruption", f"severity {SEVERITIES[0]}", *map(str, SEVERITIES[1:]), "mean"], rows)
